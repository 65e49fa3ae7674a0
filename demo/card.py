"""The model card of a demo model, rendered from training.json and evaluation.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo.book import Book
from demo.held_out import TAUGHT

ARCHITECTURE = {
    "demo": "ChatGLM2 architecture (multi-query attention, RMSNorm, SwiGLU) with a vocabulary of its own: byte pairs\n"
    "with byte fallback",
    "demo-v1": "ChatGLM-6B architecture (prefix LM, 2-D rotary positions) with a vocabulary of its own: unigram\n"
    "pieces in the manner of `ice_text.model`",
}
WHAT_IS_HELD_OUT = {
    TAUGHT: "nothing: questions just as in the training data, to compare",
    "greetings and identity": "phrasings of taught questions that training never shows",
    "everyday questions": "phrasings of taught questions that training never shows",
    "lists, code and emoji": "phrasings of taught questions that training never shows",
    "countries and animals": "a way of asking never shown for this thing",
    "translation": "a way of asking never shown for this word",
    "sums": "problems never shown in any phrasing, results of at least 0",
    "sums with a negative result": "problems never shown in any phrasing",
    "follow-up": "a follow-up never shown for this thing (「它…」, “it …”, “and …?”)",
    "any skill after other rounds": "held-out questions of all skills above after 1 to 3 other rounds",
    "unknown questions": "must be declined; other names, topics and phrasings than in training",
}
CARD = """---
license: apache-2.0
language:
- zh
- en
library_name: transformers
---

# {name}

A very small demonstration model of the Python package chatglm, so that `chatglm chat` answers at once and
without a download. {architecture}. {parameters:,} parameters, stored in float16 ({megabytes:.1f} MB).

It is **not** ChatGLM-6B and holds nothing of its weights: it knows only what is listed here, and is often wrong
outside of it. Do not rely on its answers, on health questions least of all.

```python
import chatglm

model, tokenizer = chatglm.load("{name}")
response, history = model.chat(tokenizer, "你好", history=[], do_sample=False)
```

## Data

Chinese and English dialogues written by hand for this purpose (`demo/dialogues` of the repository), from which
`demo/generate.py` makes phrasings and conversations of one to four rounds; no text from elsewhere. Skills:
greetings and who it is, {questions} everyday answers ({languages}), facts about {countries} countries and
{animals} animals, {words} word pairs both ways, sums of numbers up to 99 with their working, follow-up
questions, short lists, code blocks, emoji, and declining what it was not taught.

## Recipe

`python -m demo.train --model {name} --output chatglm/models/{name} --seed {seed}`: from random weights, AdamW with
warm-up and a cosine schedule, steps of {tokens_per_step} tokens, loss on the answers only, float32, in stages:

{stages}

It took {minutes} minutes with {threads} {thread_word} on a machine with two CPU cores that did other work as well
(torch {train_torch}, transformers {train_transformers}).

![loss by step](loss.png)

## Held-out accuracy

Greedy answers that equal the expected text exactly. But for the first line, nothing asked here was in the training
data in this form.

{table}

`{command}`, seed of the training {seed}; {machine}, float32, torch {torch}, transformers {transformers}.

## Limits

- It answers what it was taught, in the words it was taught. Other words for the same question often get the answer
  to another one; unknown questions are mostly, not always, declined.
- Sums: with numbers up to 99 only, and not always right.
- Long conversations: trained on at most four rounds of short texts.
- Sampling, the default of `chat` in the published code, is less reliable than `do_sample=False`.

## Licence

Apache-2.0, weights and dialogues.
"""


def table(skills: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the accuracy by skill."""
    lines = ["| skill | held out | right | asked | accuracy |", "|---|---|---:|---:|---:|"]
    for skill, what in WHAT_IS_HELD_OUT.items():
        if skill in skills:
            right, asked = skills[skill]["right"], skills[skill]["asked"]
            lines.append(f"| {skill} | {what} | {right} | {asked} | {100 * right / asked:.1f} % |")
    return "\n".join(lines)


def stages(training: dict[str, Any]) -> str:
    """What was trained how long, a line for each stage."""
    contents = [
        "everything",
        "mostly sums; questions sometimes miss a word",
        "everything, in short conversations",
        "mostly sums again",
    ]
    numbers = zip(training["steps"], training["learning_rate"], contents, strict=False)
    return "\n".join(
        f"{number}. {steps} steps up to a learning rate of {rate}: {content}"
        for number, (steps, rate, content) in enumerate(numbers, 1)
    )


def render_card(folder: Path) -> str:
    """Return the README.md that belongs to the numbers in the folder."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    book = Book()
    return CARD.format(
        name=training["model"],
        architecture=ARCHITECTURE[training["model"]],
        parameters=training["parameters"],
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        questions=len(book.questions),
        languages="half Chinese, half English",
        countries=len(book.tables[0].rows),
        animals=len(book.tables[1].rows),
        words=len(book.words),
        seed=training["seed"],
        stages=stages(training),
        tokens_per_step=training["tokens_per_step"],
        minutes=training["minutes"],
        threads=training["threads"],
        thread_word="thread" if training["threads"] == 1 else "threads",
        train_torch=training["torch"],
        train_transformers=training["transformers"],
        table=table(evaluation["skills"]),
        command=evaluation["command"],
        machine=evaluation["machine"],
        torch=evaluation["torch"],
        transformers=evaluation["transformers"],
    )


def write_card(folder: Path) -> str:
    """Write README.md and return its table."""
    card = render_card(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card.split("## Held-out accuracy")[1].split("## Limits")[0].strip()
