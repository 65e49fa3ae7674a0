"""Learning from preferences with TRL: reward models, DPO, reinforcement learning; no training loop of its own.

settings.py   what the three commands are asked to do
rows.py       records -> pairs of answers, or prompts, and what is wrong with the others
layout.py     pairs and prompts -> the messages that TRL takes, through the chat template; their lengths
run.py        what a run of each command has in common: check, read, load, train, save, report
reward.py     reward models: trained, saved in two forms, loaded, asked
dpo.py        DPO against the same model without its adapter
rl.py         GRPO and RLOO with a reward model
report.py     the curves and the README.md beside what was trained
"""
