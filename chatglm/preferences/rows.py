"""Records -> pairs of answers, or prompts alone, with a report of everything that is wrong with them.

A prompt is text, with the rounds before in a history column, or a list of messages; an answer is text, or a list of
messages that ends with it (with the prompt in front, as some data sets have it, or without).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from chatglm.training.files import Record
from chatglm.training.rows import (
    HISTORY,
    MESSAGES,
    Data,
    Turn,
    collect,
    filled,
    history_of,
)

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = ("prompt", "content")  # names that published data sets have


@dataclass(frozen=True)
class Prompt:
    """What is asked, after what was said before."""

    place: str
    query: str
    history: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Pair(Prompt):
    """A better and a worse answer to a prompt."""

    chosen: str = ""
    rejected: str = ""


class PreferenceData(Data):
    """What some files hold: rows are Prompts or Pairs."""

    @property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order."""
        texts = [astuple(row)[1:] for row in self.rows]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def read_pairs(
    files: Iterable[Path],
    prompt_column: str | None = None,
    chosen_column: str | None = None,
    rejected_column: str | None = None,
    history_column: str | None = None,
    most_rows: int | None = None,
) -> PreferenceData:
    """The pairs of all files, at most `most_rows` records of them.

    Columns that are not named are `prompt` (or none, where answers bring it), `chosen`, `rejected`, and `history` if
    it is there. Raises OSError and ValueError as `read_data` of finetuning does.
    """

    def reader(file: Path, records: Sequence[Record]) -> Callable[[Record], list[Pair]]:
        there = _columns(records)
        named = {"prompt": prompt_column, "chosen": chosen_column, "rejected": rejected_column}
        _check_named(file, there, named | {"history": history_column})
        chosen, rejected = chosen_column or CHOSEN, rejected_column or REJECTED
        if there and not {chosen, rejected} <= set(there):
            raise ValueError(
                f"{file} has the columns {', '.join(there)}, but pairs need {chosen} and {rejected}; name them with "
                "--chosen-column and --rejected-column."
            )
        prompt = prompt_column or _first(PROMPTS, there)
        history = history_column or _first((HISTORY,), there)
        return lambda record: [_pair(record, prompt, chosen, rejected, history)]

    return collect(files, reader, most_rows, PreferenceData)


def read_prompts(
    files: Iterable[Path],
    prompt_column: str | None = None,
    history_column: str | None = None,
    most_rows: int | None = None,
) -> PreferenceData:
    """The prompts of all files, at most `most_rows` records of them; answers in the files are passed over.

    Columns that are not named are `messages`, `prompt` or `content`, and `history` if it is there. Raises OSError and
    ValueError as `read_data` of finetuning does.
    """

    def reader(file: Path, records: Sequence[Record]) -> Callable[[Record], list[Prompt]]:
        there = _columns(records)
        _check_named(file, there, {"prompt": prompt_column, "history": history_column})
        prompt = prompt_column or _first((MESSAGES, *PROMPTS), there)
        if there and prompt is None:
            raise ValueError(
                f"{file} has the columns {', '.join(there)}, of which none is known; name one with --prompt-column."
            )
        history = history_column or _first((HISTORY,), there)
        return lambda record: [_prompt(record, prompt or PROMPTS[0], history)]

    return collect(files, reader, most_rows, PreferenceData)


def _columns(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.columns))


def _first(names: Iterable[str], there: Sequence[str]) -> str | None:
    return next((name for name in names if name in there), None)


def _check_named(file: Path, there: Sequence[str], named: dict[str, str | None]) -> None:
    for option, name in named.items():
        if there and name is not None and name not in there:
            raise ValueError(
                f"{file} has no column {name!r}; it has {', '.join(there)}: name one with --{option}-column."
            )


def _prompt(record: Record, column: str, history: str | None) -> Prompt:
    value = record.columns.get(column)
    if isinstance(value, list):
        rounds, query, _ = _conversation(value, column)
        if not query.strip():
            raise ValueError(f"the last question of {column} is empty")
        return Prompt(record.place, query, rounds)
    return Prompt(record.place, filled(record, column), history_of(record, history) if history else ())


def _pair(record: Record, prompt: str | None, chosen: str, rejected: str, history: str | None) -> Pair:
    before = None if prompt is None or prompt not in record.columns else _prompt(record, prompt, history)
    answers = [_answer(record, column, before) for column in (chosen, rejected)]
    (place, good), (other, bad) = answers
    if place != other:
        raise ValueError(f"{chosen} and {rejected} answer different prompts")
    if good == bad:
        raise ValueError(f"{chosen} and {rejected} are the same")
    return Pair(record.place, place.query, place.history, good, bad)


def _answer(record: Record, column: str, before: Prompt | None) -> tuple[Prompt, str]:
    """The prompt of an answer and its text."""
    value = record.columns.get(column)
    if not isinstance(value, list):
        if before is None:
            raise ValueError("there is no prompt")
        return before, filled(record, column)
    if before is not None and len(value) == 1 and _role(value[0]) == "assistant":
        value = [{"role": "user", "content": before.query}, *value]
        _, _, answer = _conversation(value, column)
    else:
        rounds, query, answer = _conversation(value, column)
        own = Prompt(record.place, query, rounds)
        if before not in (None, own):
            raise ValueError(f"{column} brings another prompt than the column of prompts")
        before = own
    if not (answer or "").strip():
        raise ValueError(f"{column} holds no answer")
    return before, answer


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _conversation(messages: list[Any], column: str) -> tuple[tuple[Turn, ...], str, str | None]:
    from chatglm.hub.tokenization_chatglm import split_messages  # takes seconds to import

    if not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{column} is no list of {{role, content}}")
    try:
        history, query, answer = split_messages(messages)
    except ValueError:
        raise ValueError(f"{column} has no turns of user and assistant with text") from None
    return tuple(history), query, answer
