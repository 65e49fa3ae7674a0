"""Cuts the growing answers of `stream_chat` into pieces of new text that can be shown for good."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

History = list[tuple[str, str]]

# What process_response may still change when the answer goes on.
PLACEHOLDER = "[[训练时间]]"  # becomes a year
MARKS = ",!:;?"  # of ChatGLM-6B: become full-width before a Chinese character


def new_text(answers: Iterable[tuple[str, History]], family: str) -> Iterator[tuple[str, History]]:
    """Yields (new text, history so far) for each (answer so far, history) of a stream.

    The pieces add up to the last answer exactly; a piece is empty where nothing new is certain.

        "你", "你a", "你a,", "你a，我"  ->  "你", "a", "", "，我"    (family "chatglm")
    """
    shown, answer = 0, ""
    history: History = []
    for answer, history in answers:
        settled = max(shown, settled_length(answer, family))
        yield answer[shown:settled], history
        shown = settled
    if len(answer) > shown:
        yield answer[shown:], history


def settled_length(answer: str, family: str) -> int:
    """Returns how many characters of `answer` stay as they are however it goes on."""
    for length in range(len(PLACEHOLDER) - 1, 0, -1):
        if answer.endswith(PLACEHOLDER[:length]):
            return len(answer) - length
    if family == "chatglm" and answer.endswith(tuple(MARKS)):
        return len(answer) - 1
    return len(answer)
