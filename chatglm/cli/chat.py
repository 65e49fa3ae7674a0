"""`chatglm chat [MODEL]`: a conversation in the terminal, printed as it is generated."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.cli.options import add_model_options
from chatglm.find import OURS, find_checkpoint
from chatglm.streaming import History, new_text

if TYPE_CHECKING:
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

HELP = "clear forgets what was said, stop or Ctrl-D leaves, Ctrl-C stops an answer."
CLEAR_SCREEN = "\033[H\033[2J\033[3J"  # cursor to the top, screen and what scrolled off it
UNPRINTABLE = dict.fromkeys(set(range(32)) - {9, 10})  # a model must not steer the terminal
ROOM = 256  # tokens an answer should have at least, or a quarter of a shorter context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    lengths = "2048 for ChatGLM-6B, 8192 for ChatGLM2-6B, less for models with a shorter context"
    add("--max-length", type=whole_number, help=f"tokens of prompt and answer (default: {lengths})")
    temperatures = "0.95 for ChatGLM-6B, 0.8 for ChatGLM2-6B, 0 for demo and demo-v1"
    add("--temperature", type=temperature, help=f"0: always the likeliest (default: {temperatures})")
    shares = "0.7 for ChatGLM-6B, 0.8 for ChatGLM2-6B"
    add("--top-p", type=share, help=f"choose among the likeliest with this share (default: {shares})")
    add("--seed", type=int, help="the same seed gives the same answers (default: another each time)")


def run(arguments: argparse.Namespace) -> None:
    # Before torch is imported, which takes seconds: most mistakes are told at once.
    checkpoint = read_checkpoint(find_checkpoint(arguments.model, arguments.revision))
    if sys.stdin.isatty():
        print(f"Loading {arguments.model} ...", flush=True)
    import torch

    try:
        _chat_with(checkpoint, arguments)
    except torch.OutOfMemoryError:
        raise MemoryError(
            "The memory of the device is used up; try --quantize 4, a smaller --max-length or "
            "--device cpu, and see what chatglm info tells."
        ) from None


def _chat_with(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    import transformers

    from chatglm.loading import LARGE, load

    if checkpoint.sizes.parameters < LARGE:
        transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(checkpoint.folder, arguments.device, arguments.dtype, arguments.quantize)
    if arguments.seed is not None:
        transformers.set_seed(arguments.seed)
    chat = Chat(
        model,
        tokenizer,
        max_length=arguments.max_length,
        temperature=_temperature(arguments),
        top_p=arguments.top_p,
    )
    if sys.stdin.isatty():
        dtype = str(model.dtype).removeprefix("torch.")
        print(f"{checkpoint.sizes.parameters:,} parameters, {dtype} on {model.device}.\n{HELP}")
        converse(chat, typed_messages(), prefix="ChatGLM: ", keep_going=True)
    else:
        converse(chat, (line.rstrip("\n") for line in sys.stdin))


class Chat:
    """A conversation: what was said, and the settings with which it goes on."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        max_length: int | None = None,
        **sampling: float | None,
    ) -> None:
        from chatglm.hub.generation_chatglm import PromptCache

        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length or _default_max_length(model)
        self.sampling = sampling
        self.history: History = []
        self.prompt_cache = PromptCache()

    def answer(self, query: str) -> Iterator[str]:
        """Yields the answer in pieces; `history` holds at every moment what was said so far."""
        stream = self.model.stream_chat(
            self.tokenizer,
            query,
            self.history,
            max_length=self.max_length,
            prompt_cache=self.prompt_cache,
            **self.sampling,
        )
        for text, history in new_text(stream, self.model.config.family):
            self.history = history
            yield text

    def make_room(self, query: str) -> int:
        """Forgets the oldest rounds until an answer to `query` has room; returns how many."""
        from chatglm.hub.tokenization_chatglm import trim_history

        room = min(ROOM, self.max_length // 4)
        kept = trim_history(self.tokenizer, query, self.history, self.max_length - room)
        forgotten = len(self.history) - len(kept)
        self.history = kept
        return forgotten

    def clear(self) -> None:
        """Forgets all that was said."""
        self.history = []
        self.prompt_cache.clear()


def converse(chat: Chat, messages: Iterable[str], prefix: str = "", keep_going: bool = False) -> None:
    """Answers one message after another until `stop` or the last one; `clear` starts afresh.

    With `keep_going` a message that cannot be answered is told and the next one is taken.
    """
    for message in messages:
        command = message.strip()
        if command == "stop":
            return
        if command == "clear":
            chat.clear()
            print(CLEAR_SCREEN if sys.stdout.isatty() else "", end="", flush=True)
        elif command:
            try:
                reply(chat, message, prefix)
            except ValueError as error:
                if not keep_going:
                    raise
                print(error)


def reply(chat: Chat, message: str, prefix: str = "") -> None:
    """Prints one answer as it comes; Ctrl-C ends it, and what was printed counts as said."""
    forgotten = chat.make_room(message)
    if forgotten:
        print(f"(To make room, the oldest {forgotten} of the rounds were forgotten.)")
    print(prefix, end="", flush=True)
    try:
        for text in chat.answer(message):
            print(text.translate(UNPRINTABLE), end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        print()


def typed_messages() -> Iterator[str]:
    """Asks for one message after another until Ctrl-D; Ctrl-C drops the line.

    Pasted text stays one message however many lines it has; Alt-Enter types a line break.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(key_bindings=keys, reserve_space_for_menu=0)
    while True:
        try:
            yield session.prompt("\nYou: ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def _default_max_length(model: ChatGLMForConditionalGeneration) -> int:
    from chatglm.hub.tokenization_chatglm import CHAT_DEFAULTS

    published = CHAT_DEFAULTS[model.config.family]["max_length"]
    return min(published, model.config.max_position_embeddings)


def _temperature(arguments: argparse.Namespace) -> float | None:
    if arguments.temperature is None and arguments.model in OURS:
        return 0.0  # so small a model knows one answer at most
    return arguments.temperature


def whole_number(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return float(text)


def share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return float(text)
