"""Data files, line by line, and data sets of the Hub. What cannot be read is told with file and line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LARGEST_FILE = 200_000_000  # bytes; the largest published one, MMLU as JSON lines, has about 10 million
Row = tuple[str, dict[str, Any]]  # where it stands, for people, and its fields


def json_lines(file: Path) -> Iterator[Row]:
    """The objects of a file that has one on each line; empty lines are passed over."""
    for number, line in enumerate(read_text(file).split("\n"), 1):  # splitlines() would cut inside strings
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _object(place, line)


def csv_rows(file: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a CSV file, whose first line names the columns unless `columns` does."""
    reader = csv.reader(read_text(file).splitlines(keepends=True))
    try:
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if columns is None:
                columns = row
            elif row and len(row) != len(columns):
                raise ValueError(
                    f"{place} has {len(row)} fields where {len(columns)} belong; correct the line."
                )
            elif row:
                yield place, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num} is no valid CSV: {error}.") from None


def json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    return _object(str(file), read_text(file))


def read_text(file: Path) -> str:
    """All of a UTF-8 file; OSError or ValueError, naming the line, for what is none."""
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than {LARGEST_FILE:,}; split it.")
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line} is not UTF-8; save the file in UTF-8.") from None


def _object(place: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{place} is no valid JSON; correct it, or take the file once more.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place} is no object with fields, but {type(value).__name__}.")
    return value


def text_of(row: Row, field: str) -> str:
    """A field that must be a text with something in it."""
    place, fields = row
    value = fields.get(field)
    if not isinstance(value, str) or not value.strip():
        what = f"has {field} {value!r}" if field in fields else f"has no {field!r}"
        raise ValueError(f"{place} {what:.100}; it must be a text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place} has half of a surrogate pair in {field}, which is no character.") from None
    return value


def letter_of(row: Row, field: str, letters: str) -> str:
    """A field that names one of the choices by its letter or by its number from 0."""
    place, fields = row
    value = fields.get(field)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip() in letters:
        return value.strip()
    raise ValueError(
        f"{place} has {field} {value!r:.100}; it must be one of {', '.join(letters)}, or 0 to {len(letters) - 1}."
    )


def existing_folder(data: Path) -> Path:
    """The folder; OSError if there is none."""
    if not data.is_dir():
        raise OSError(f"There is no folder {data}; give the folder that holds the data.")
    return data


def hub_rows(name: str, config: str, split: str) -> list[Row]:
    """A split of a data set on the Hub, through the package `datasets` (or its cache, offline)."""
    if find_spec("datasets") is None:
        raise ValueError(
            f"Without --data the questions come from {name} through the package datasets, which is not installed; "
            "give a folder with --data, or pip install datasets."
        )
    from datasets import load_dataset

    place = f"{name}, {config}, {split}"
    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"{place} cannot be had ({reason[:200]}); give a folder that has the data with --data."
        ) from None
    return [(f"{place}, row {number}", dict(row)) for number, row in enumerate(rows)]
