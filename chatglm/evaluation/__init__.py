"""How good a model is: published benchmarks, own questions, and what packing costs.

question.py   a question, and what every benchmark offers
ceval.py, mmlu.py, gsm8k.py, bbh.py, own.py   one benchmark each: its questions and its judgement
files.py      data files and data sets of the Hub, with errors that name file and line
reader.py     a model that answers batches: text, or the letter of a choice
journal.py    answers on disk, so that a run that was cut off goes on
run.py        the runner that all benchmarks share
results.py    scores as JSON, Markdown and a chart beside the published figures
packing.py    perplexity, agreement and error of int8 and int4 weights
harness.py    our models in the lm-evaluation-harness
"""
