"""What went wrong, as people are told it: one sentence that names the way out."""

from __future__ import annotations

# What a command may raise instead of a traceback; all else is a mistake of ours.
EXPECTED = (OSError, ValueError, MemoryError)


def in_words(error: BaseException) -> str:
    """The sentence of an error; Python's own, where they name no way out, are completed."""
    if isinstance(error, PermissionError) and error.filename:
        return f"Permission denied: {error.filename}; choose another place, or change its permissions."
    if isinstance(error, UnicodeEncodeError) and not error.encoding.startswith("utf"):
        missing = error.object[error.start]
        return f"The output is {error.encoding}, which has no {missing!r}; set PYTHONIOENCODING=utf-8."
    return str(error)
