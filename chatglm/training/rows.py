"""Records -> conversations to learn from, with a report of everything that is wrong with them.

Three forms are known: two columns (`content` and `summary`, `prompt` and `response`, or any other names), the
same with the rounds before in a history column, and `messages` as chat templates take them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from chatglm.training.files import Record, read_records

Turn = tuple[str, str]

PAIRS = (("content", "summary"), ("prompt", "response"))  # the names that published data sets have
HISTORY = "history"
MESSAGES = "messages"


@dataclass(frozen=True)
class Row:
    """One answer to learn: what was said before, what is asked, what is right."""

    place: str
    query: str
    answer: str
    history: tuple[Turn, ...] = ()
    rounds: bool = False  # whether the prompt of ChatGLM-6B numbers its rounds even if there is one only


@dataclass(frozen=True)
class Columns:
    """The names that a file has for what we need; `messages` alone, or the others."""

    prompt: str = ""
    response: str = ""
    history: str | None = None
    messages: str | None = None


@dataclass
class Problems:
    """What is wrong with the data: places by the kind of problem, left out or only noted."""

    left_out: dict[str, list[str]] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, place: str, reason: str) -> None:
        """Counts a record that cannot be learned from."""
        self.left_out.setdefault(reason, []).append(place)

    def note(self, place: str, reason: str) -> None:
        """Counts a record that is learned from, but not as it stands."""
        self.noted.setdefault(reason, []).append(place)

    @property
    def number_left_out(self) -> int:
        """Of records."""
        return sum(map(len, self.left_out.values()))

    def lines(self, places: int | None = None) -> list[str]:
        """A line a kind of problem, with the first `places` places (None: all)."""
        found = [(reason, where, "left out") for reason, where in self.left_out.items()]
        found += [(reason, where, "kept") for reason, where in self.noted.items()]
        return [f"{len(where)} {fate}: {reason} ({_some(where, places)})" for reason, where, fate in found]


def _some(places: Sequence[str], number: int | None) -> str:
    more = len(places) - (number or len(places))
    return ", ".join(places[:number]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Data:
    """What some files hold."""

    rows: list[Row]
    records: int
    problems: Problems

    @property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order."""
        texts = [[row.query, row.answer, row.history, row.rounds] for row in self.rows]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


Kind = TypeVar("Kind", bound=Data)


def read_data(
    files: Iterable[Path],
    prompt_column: str | None = None,
    response_column: str | None = None,
    history_column: str | None = None,
    every_turn: bool = False,
    most_rows: int | None = None,
) -> Data:
    """The rows of all files, at most `most_rows` records of them.

    Columns that are not named are found: `messages`, or `content` and `summary`, or `prompt` and `response`, and
    `history` beside the last two. With `every_turn` each answer of a conversation is a row of its own.

    Raises OSError for missing files, and ValueError for broken ones, columns that are not there (naming those that
    are), and files without any row.
    """

    def reader(file: Path, records: Sequence[Record]) -> Callable[[Record], list[Row]]:
        columns = find_columns(file, records, prompt_column, response_column, history_column)
        return lambda record: _rows(record, columns, every_turn)

    return collect(files, reader, most_rows, Data)


def collect(
    files: Iterable[Path],
    reader: Callable[[Path, Sequence[Record]], Callable[[Record], list[Any]]],
    most_rows: int | None,
    kind: type[Kind],
) -> Kind:
    """The rows of the first `most_rows` records of all files.

    `reader` looks at the records of a file and returns what makes rows of one, or raises ValueError with the reason
    for which it is left out.
    """
    problems, rows, number = Problems(), [], 0
    for file in files:
        records = read_records(file)
        if most_rows is not None:
            records = records[: max(0, most_rows - number)]
            if not records:
                break
        rows_of = reader(file, records)
        number += len(records)
        for record in records:
            reason = record.problem
            if not reason:
                try:
                    rows += rows_of(record)
                except ValueError as error:
                    reason = str(error)
            if reason:
                problems.leave_out(record.place, reason)
    if not rows:
        names = ", ".join(map(str, files))
        raise ValueError(
            f"{names}: there is nothing to learn; " + ("; ".join(problems.lines(3)) or "no rows") + "."
        )
    return kind(rows, number, problems)


def find_columns(
    file: Path, records: Sequence[Record], prompt: str | None, response: str | None, history: str | None
) -> Columns:
    """The columns to read; ValueError, naming those that are there, if a wanted one is in no record."""
    there = list(dict.fromkeys(name for record in records for name in record.columns))
    if not there:
        return Columns(prompt or "prompt", response or "response", history)
    for option, name in (("prompt", prompt), ("response", response), ("history", history)):
        if name is not None and name not in there:
            raise ValueError(
                f"{file} has no column {name!r}; it has {', '.join(there)}: name one with --{option}-column."
            )
    if not (prompt or response or history) and MESSAGES in there:
        return Columns(messages=MESSAGES)
    found = next((pair for pair in PAIRS if set(pair) <= set(there)), (None, None))
    prompt, response = prompt or found[0], response or found[1]
    if prompt is None or response is None:
        raise ValueError(
            f"{file} has the columns {', '.join(there)}, of which none is known; name them with --prompt-column and "
            "--response-column."
        )
    if history is None and (prompt, response) == PAIRS[1] and HISTORY in there:
        history = HISTORY
    return Columns(prompt, response, history)


def _rows(record: Record, columns: Columns, every_turn: bool) -> list[Row]:
    if columns.messages:
        history, query, answer = _from_messages(record.columns.get(columns.messages))
    else:
        query = filled(record, columns.prompt)
        answer = filled(record, columns.response)
        history = history_of(record, columns.history) if columns.history else ()
    rounds = columns.history is not None
    last = Row(record.place, query, answer, history, rounds)
    if not every_turn:
        return [last]
    before = [Row(record.place, q, a, history[:i], rounds) for i, (q, a) in enumerate(history) if a.strip()]
    return [*before, last]


def filled(record: Record, name: str) -> str:
    """The text of a column; ValueError, with the reason, if there is none."""
    if name not in record.columns:
        raise ValueError(f"there is no {name}")
    value = record.columns[name]
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{name} is empty")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text")
    return value


def history_of(record: Record, name: str) -> tuple[Turn, ...]:
    """The rounds before, of a column with lists of [query, response], as JSON in a CSV file."""
    value = record.columns.get(name)
    if isinstance(value, str) and value.strip():  # CSV has no lists
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{name} is no list of [query, response]") from None
    turns = value or []
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise ValueError(f"{name} is no list of [query, response]")
    return tuple((query, response) for query, response in turns)


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _from_messages(messages: Any) -> tuple[tuple[Turn, ...], str, str]:
    from chatglm.hub.tokenization_chatglm import split_messages  # takes seconds to import

    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages is no list of {role, content}")
    counts = Counter(message.get("role") for message in messages)
    if not counts["assistant"]:
        raise ValueError("messages hold no answer")
    if messages[-1].get("role") == "user":
        messages = messages[:-1]  # a question that nobody answered teaches nothing
    try:
        history, query, answer = split_messages(messages)
    except ValueError:
        raise ValueError("messages are no turns of user and assistant with text") from None
    if not query.strip() or not (answer or "").strip():
        raise ValueError("the last question or answer of messages is empty")
    return tuple(history), query, answer or ""
