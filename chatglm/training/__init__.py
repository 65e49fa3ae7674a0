"""Finetuning: data, methods and reports around transformers' Trainer and PEFT; no training loop of its own.

settings.py   what a run is asked to do, from flags and YAML, checked before anything is loaded
files.py      JSON, JSONL, CSV and Parquet, record by record
rows.py       records -> conversations, and what is wrong with the others
layout.py     conversations -> token ids and labels, as published; batches, packing
methods.py    what of a model is trained, and how it is saved and loaded: LoRA, P-Tuning v2, full, freeze
trainer.py    the few things that transformers' Trainer is told
scores.py     BLEU-4 and ROUGE of answers
report.py     the loss curve and the README.md beside what was trained
processes.py  several processes that make one run: they fail together, and the first writes
launch/       configurations of accelerate launch: FSDP, DeepSpeed ZeRO-3
finetune.py   a whole run
"""
