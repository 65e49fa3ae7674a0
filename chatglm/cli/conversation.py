"""A conversation: what was said, the system prompt, and how both go to a file and come back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from chatglm.cli.backends import Answer, Backend, Message

LARGEST_MESSAGE = 1 << 20  # bytes; the longest prompt that any of the models reads has about a tenth of it
LARGEST_FILE = 64 << 20  # bytes


class Conversation:
    """What was said with a backend, and what may be said next.

    `messages` are the user's and the assistant's in turn. They hold at every moment what was said so far, and all
    of it, also the rounds that the model no longer reads. The last one is a user's while it has no answer.
    """

    def __init__(self, backend: Backend, system: str = "") -> None:
        self.backend = backend
        self.messages: list[Message] = []
        self.system = system
        self.last_answer = Answer()
        self._unread = 0  # messages at the beginning for which the model has no room any more

    def ask(self, query: str) -> Generator[str, None, None]:
        """Yields the answer to `query` in pieces; both belong to the conversation from then on."""
        check_text(query)
        self._drop_unanswered()
        self.messages.append({"role": "user", "content": query})
        return self._answer()

    def retry(self) -> Generator[str, None, None]:
        """Yields another answer to the last question, in place of the one it had."""
        if not self.messages:
            raise ValueError("There is no question yet that could be asked again.")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self._answer()

    def set_system(self, text: str) -> None:
        """Gives the model `text` before the first message from now on; nothing if it is empty."""
        check_text(text)
        self.system = text

    def clear(self) -> None:
        """Forgets all that was said; the system prompt stays."""
        self.messages = []
        self._unread = 0
        self.backend.clear()

    def save(self, file: Path, overwrite: bool = False) -> None:
        """Writes system prompt and messages as JSON: all of it, or nothing and an OSError."""
        if not self.messages:
            raise ValueError("Nothing was said yet that could be saved.")
        text = json.dumps({"messages": self._all_messages(self.messages)}, ensure_ascii=False, indent=2)
        write_whole(file, text + "\n", overwrite)

    def load(self, file: Path) -> None:
        """Goes on with what `save` wrote; an OSError or ValueError leaves everything as it was."""
        messages = read_messages(file)
        self.clear()
        self.system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        self.messages = messages

    def _answer(self) -> Generator[str, None, None]:
        asked = len(self.messages)
        self.last_answer = self.backend.answer(self._all_messages(self.messages[self._unread :]))
        said = ""
        with closing(self.last_answer.pieces):
            for text in self.last_answer:
                said += text
                if said:
                    self.messages[asked:] = [{"role": "assistant", "content": said}]
                yield text
        self.messages[asked:] = [{"role": "assistant", "content": said}]
        self._unread += 2 * self.last_answer.left_out

    def _drop_unanswered(self) -> None:
        if len(self.messages) % 2:
            self.messages.pop()

    def _all_messages(self, messages: list[Message]) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + messages


def check_text(text: str) -> None:
    """Raises ValueError for what no model can read: far too much, or bytes that are no characters."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The message has {text[error.start]!r} at position {error.start}, which is no character; "
            "write or send it as UTF-8."
        ) from None
    if size > LARGEST_MESSAGE:
        raise ValueError(
            f"The message has more than {LARGEST_MESSAGE:,} bytes; no model reads so much at once."
        )


def read_messages(file: Path) -> list[Message]:
    """Returns the messages of a saved conversation: perhaps a system message, then user and assistant in turn."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {str(file)!r}.")
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{str(file)!r} has more than {LARGEST_FILE:,} bytes, which is no conversation.")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is no JSON ({error}); give a file that /save wrote.") from None
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(
            f'{str(file)!r} is no conversation; it must be {{"messages": [{{"role": …, "content": …}}, …]}} '
            "with texts as contents."
        )
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    roles = [message["role"] for message in messages]
    spoken = roles[roles[0] == "system" :]
    if not spoken or spoken != [("user", "assistant")[i % 2] for i in range(len(spoken))]:
        raise ValueError(
            f"In {str(file)!r} the roles do not take turns; after an optional system message, user and "
            "assistant must, beginning with user."
        )
    return messages


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if not isinstance(content, str):
        return False
    check_text(content)
    return True


def write_whole(file: Path, text: str, overwrite: bool) -> None:
    """Writes a file that is there whole or not at all, readable by its owner alone."""
    file = file.resolve()
    if file.exists() and not (overwrite and file.is_file()):
        way_out = (
            "give another name" if not file.is_file() else "give another name, or /save! to overwrite it"
        )
        raise FileExistsError(f"{str(file)!r} exists already; {way_out}.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {str(file.parent)!r}; make it, or give another place.")
    try:
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(handle)
            os.replace(partial, file)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise OSError(f"{str(file)!r} cannot be written: {error.strerror}.") from None
