"""The model that is served: its engine, its name, and how conversations and texts become prompts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatglm.find import OURS, local_folder
from chatglm.server.schemas import Message
from chatglm.server.settings import Settings

if TYPE_CHECKING:
    from chatglm.checkpoint import Checkpoint
    from chatglm.engine.cluster import Scale
    from chatglm.engine.engine import Engine
    from chatglm.engine.replicas import ReplicaEngine
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer


@dataclass(frozen=True)
class Model:
    """A model in its engine, and what is told of it."""

    id: str
    engine: Engine | ReplicaEngine
    tokenizer: ChatGLMTokenizer
    family: str  # "chatglm" or "chatglm2"
    parameters: int
    bytes: int  # of the weights as they lie in memory
    dtype: str
    device: str
    # Where a request does not say.
    temperature: float
    top_p: float
    max_length: int  # tokens of prompt and answer of POST /

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, as `chat` encodes them; ValueError where it is none."""
        from chatglm.hub.tokenization_chatglm import split_messages

        history, query, _ = split_messages(as_turns(messages))
        if not query.strip():
            raise ValueError("The last message is empty; write what the model shall answer.")
        return self.tokenizer.encode_chat(query, history)

    def text_prompt(self, text: str) -> list[int]:
        """The ids of a plain text with the tokens that stand in every prompt; spellings of others stay text."""
        return self.tokenizer(text, split_special_tokens=True)["input_ids"]


def as_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Puts messages into the order of the ChatGLM prompt: perhaps a system message, then user and assistant in turns.

    - system and developer messages at the beginning become one; further ones are part of the user's turn they stand in;
    - neighbouring messages of one side become one, line by line;
    - where the assistant speaks first (a greeting), the user has said nothing before.

    Raises ValueError where the assistant speaks last: there is nothing to answer.
    """
    instructions = ("system", "developer")
    first = next((i for i, message in enumerate(messages) if message.role not in instructions), len(messages))
    system = "\n".join(message.text for message in messages[:first])
    turns: list[dict[str, str]] = []
    for message in messages[first:]:
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + message.text
        else:
            turns.append({"role": role, "content": message.text})
    if not turns:  # instructions alone are what is to be answered
        return [{"role": "user", "content": system}]
    if turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": ""})
    if turns[-1]["role"] == "assistant":
        raise ValueError(
            "The last message is the assistant's; end with a message of the user, which is answered."
        )
    return [{"role": "system", "content": system}, *turns] if first else turns


def load_model(
    name: str,
    settings: Settings,
    revision: str | None = None,
    scale: Scale | None = None,
    **loading: Any,
) -> Model:
    """Loads a model as `chatglm.load` does and starts its engine.

    `name` is "demo", "demo-v1", a folder or a Hub name; `loading` are device, dtype, quantize and adapter, after which
    the model is called. With `scale`, Ray runs copies of the model in processes of their own.
    """
    from chatglm.checkpoint import read_checkpoint
    from chatglm.find import find_checkpoint
    from chatglm.hub.chat_chatglm import CHAT_DEFAULTS

    checkpoint = read_checkpoint(find_checkpoint(name, revision))
    if loading.get("adapter"):  # copies may run in other folders
        loading["adapter"] = Path(loading["adapter"]).expanduser().resolve()
    make = _engine_here if scale is None else partial(_engine_of_replicas, scale=scale)
    engine = make(checkpoint, (settings.max_batch, settings.max_queue, settings.max_context), loading)
    family, facts = engine.config.family, engine.facts
    defaults = CHAT_DEFAULTS[family]
    return Model(
        id=model_id(str(loading.get("adapter") or name)),
        engine=engine,
        tokenizer=engine.tokenizer,
        family=family,
        parameters=checkpoint.sizes.parameters,
        bytes=facts.bytes,
        dtype=facts.dtype,
        device=facts.device,
        # So small a model knows one answer at most.
        temperature=0.0 if name in OURS else defaults["temperature"],
        top_p=defaults["top_p"],
        max_length=min(defaults["max_length"], engine.context),
    )


def _engine_here(checkpoint: Checkpoint, places: tuple[int, int, int | None], loading: Any) -> Engine:
    from chatglm.engine.engine import Engine
    from chatglm.loading import load

    model, tokenizer = load(checkpoint.folder, **loading)
    return Engine(model, tokenizer, *places)


def _engine_of_replicas(
    checkpoint: Checkpoint, places: tuple[int, int, int | None], loading: Any, scale: Scale
) -> ReplicaEngine:
    from chatglm.engine.replicas import ReplicaEngine
    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint.folder)
    config = ChatGLMConfig.from_dict(dict(checkpoint.config))
    return ReplicaEngine(str(checkpoint.folder.resolve()), tokenizer, config, loading, scale, *places)


def model_id(name: str) -> str:
    """What the model is called: the name of ours, the Hub name, or the name of its folder."""
    if name in OURS or local_folder(name) is None:
        return name
    return Path(name).expanduser().resolve().name
