"""Data files, record by record: JSON, JSON lines, CSV, Parquet. What cannot be read is told, not dropped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
LONGEST_FIELD = 1 << 24  # characters of one field of a CSV file


@dataclass(frozen=True)
class Record:
    """One entry of a data file: its columns, or in `problem` why it has none."""

    file: Path
    number: int  # of the line in .jsonl, of the entry elsewhere, from 1
    columns: dict[str, Any]
    problem: str = ""

    @property
    def place(self) -> str:
        """Where it stands, for people."""
        return f"{self.file}:{self.number}"


def read_records(file: Path) -> list[Record]:
    """All entries of a data file, those that cannot be read as well.

    A .json file holds a list of objects, or one object a line as the published data do. Text is UTF-8.
    Raises OSError if there is no such file, ValueError for another kind of file or one that is broken as a whole.
    """
    check_file(file)
    readers = {".csv": _csv, ".parquet": _parquet, ".json": _json, ".jsonl": _json_lines}
    return list(readers[file.suffix.lower()](file))


def check_file(file: Path) -> None:
    """Raises OSError or ValueError unless `file` is there and of a kind that can be read."""
    if not file.is_file():
        raise OSError(f"There is no data file {file}; give the path of a file.")
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"{file} ends in {file.suffix!r}; data files end in {', '.join(ENDINGS)}.")
    if file.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(f"{file} needs pyarrow, which is not installed; pip install pyarrow.")


def _text(file: Path) -> str:
    # Bytes that are not UTF-8 become lone surrogates, which `is_utf8` finds again in the record they belong to.
    return file.read_bytes().decode("utf-8-sig", errors="surrogateescape")


def is_utf8(value: Any) -> bool:
    """Whether all text in a value of JSON can be written as UTF-8."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return all(is_utf8(key) and is_utf8(inner) for key, inner in value.items())
    return not isinstance(value, list) or all(map(is_utf8, value))


def _record(file: Path, number: int, value: Any) -> Record:
    if not isinstance(value, dict):
        return Record(file, number, {}, f"is {type(value).__name__}, not an object with columns")
    if not is_utf8(value):
        return Record(file, number, {}, "is not UTF-8")
    return Record(file, number, value)


def _json(file: Path) -> Iterator[Record]:
    text = _text(file)
    if not text.lstrip().startswith("["):
        yield from _lines(file, text)
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no valid JSON ({error}); write a list of objects, or one object a line."
        ) from None
    for number, value in enumerate(values, 1):
        yield _record(file, number, value)


def _json_lines(file: Path) -> Iterator[Record]:
    yield from _lines(file, _text(file))


def _lines(file: Path, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at characters inside strings
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            problem = "is no valid JSON" if is_utf8(line) else "is not UTF-8"
            yield Record(file, number, {}, problem)
        else:
            yield _record(file, number, value)


def _csv(file: Path) -> Iterator[Record]:
    usual = csv.field_size_limit(LONGEST_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(_text(file), newline=""), restkey="")
        for number, columns in enumerate(reader, 1):
            if "" in columns or None in columns.values():
                problem = f"has {'more' if '' in columns else 'fewer'} fields than the first line has names"
                yield Record(file, number, {}, problem)
            else:
                yield _record(file, number, columns)
    except csv.Error as error:
        raise ValueError(f"{file} is no valid CSV near line {reader.line_num}: {error}.") from None
    finally:
        csv.field_size_limit(usual)


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield _record(file, number, value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is no valid Parquet file ({reason}); write it again.") from None
