"""What a finetuning run is asked to do: one YAML or flags, checked before anything is loaded.

The fields of `Settings` are the keys of the YAML and, with dashes, the flags of `chatglm finetune`.
"""

from __future__ import annotations

import difflib
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

Chosen = TypeVar("Chosen", bound="Options")

METHODS = ("lora", "ptuning", "full", "freeze")
RUN_FILES = {  # the settings of a run in its output, by command
    "finetune": "finetune.yaml",
    "train-reward": "reward.yaml",
    "dpo": "dpo.yaml",
    "rl": "rl.yaml",
}
DTYPES = ("float32", "bfloat16", "float16")
# Safe on models of 6 billion parameters by common practice; docs/finetuning.md has what was measured on small ones.
LEARNING_RATES = {"lora": 2e-4, "ptuning": 5e-3, "full": 2e-5, "freeze": 5e-5}


def option(help: str, default: Any = None, **more: Any) -> Any:
    """A field of settings: `choices` and bounds (`above`, `least`, `below`) are checked by `check`."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Options:
    """What the settings of every command that trains can do; `data` and `output` are asked for."""

    command: ClassVar[str]

    @property
    def file(self) -> str:
        """The name of these settings in the output of a run."""
        return RUN_FILES[self.command]

    def check(self: Chosen) -> Chosen:
        """Returns itself; raises ValueError, naming field and value, for what cannot be."""
        for one in fields(self):
            _check_value(type(self), one, getattr(self, one.name))
        for name in ("data", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name}, or {name} in the YAML file.")
        return self

    def chosen(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if getattr(self, one.name) != one.default
        }


@dataclass(frozen=True)
class Settings(Options):
    """One run. Numbers of tokens count special ones as the published script did."""

    command: ClassVar[str] = "finetune"

    model: str = option("a folder, a Hub name (owner/model), demo or demo-v1", "demo")
    revision: str | None = option("branch, tag or commit of a Hub name")
    output: str = option("folder to write; refused if it holds something", "")
    # data
    data: tuple[str, ...] = option("files to learn from: .json, .jsonl, .csv, .parquet", ())
    eval_data: tuple[str, ...] = option("files whose loss is watched", ())
    probe: str | None = option("file of general questions whose loss is watched too, or none")
    prompt_column: str | None = option("column of the questions")
    response_column: str | None = option("column of the answers")
    history_column: str | None = option("column of the rounds before, lists of [query, response]")
    max_source_length: int = option("tokens of a prompt; what is longer is cut", 1024, above=8)
    max_target_length: int = option("tokens of an answer; what is longer is cut", 128, above=4)
    max_rows: int | None = option("learn from the first rows alone", above=0)
    max_eval_rows: int | None = option("watch the first rows of the evaluation files alone", above=0)
    every_turn: bool = option("learn every answer of a conversation, not only the last", False)
    packing: bool = option("several rows in one sequence (ChatGLM2-6B)", False)
    # method
    method: str = option("what is trained", "lora", choices=METHODS)
    lora_rank: int = option("rank of LoRA", 8, above=0)
    lora_alpha: float | None = option("scale of LoRA, divided by the rank (default: twice the rank)", above=0)
    lora_dropout: float = option("dropout in front of LoRA", 0.0, least=0, below=1)
    lora_target: tuple[str, ...] = option("layers with LoRA, or all-linear (default: query_key_value)", ())
    pre_seq_len: int = option("length of the P-Tuning v2 prefix", 128, above=0)
    prefix_projection: bool = option("P-Tuning v2 with two layers behind the prefix", False)
    freeze_layers: int = option("last layers that freeze trains", 3, above=0)
    quantize: int | None = option("pack the base into so many bits (lora and ptuning)", choices=(8, 4))
    device: str | None = option("cpu, cuda, mps (default: the best there is)")
    dtype: str | None = option(
        "what is computed in (default: float32 on a CPU, else bfloat16)", choices=DTYPES
    )
    # training
    learning_rate: float | None = option("the highest", above=0)
    scheduler: str = option(
        "how it falls", "linear", choices=("linear", "cosine", "constant", "constant_with_warmup")
    )
    warmup: float = option("share of the steps in which it rises first", 0.03, least=0, below=1)
    weight_decay: float = option("of AdamW", 0.0, least=0)
    epochs: float = option("passes over the data", 3.0, above=0)
    max_steps: int | None = option("steps instead of epochs", above=0)
    batch_size: int = option("rows that are computed together", 1, above=0)
    accumulation: int = option("batches that make up one step", 16, above=0)
    gradient_checkpointing: bool = option("compute more, keep less: for long rows and large models", False)
    seed: int = option("of shuffling, dropout and new weights", 0, least=0, below=2**32)
    # watching
    logging_steps: int = option("steps between two points of the loss curve", 10, above=0)
    eval_steps: int | None = option(
        "steps between two looks at the watched losses (default: each epoch)", above=0
    )
    save_steps: int = option("steps between two checkpoints to resume from; two are kept", 500, above=0)
    predict: bool = option("answer the evaluation data at the end: BLEU-4, ROUGE", False)
    predict_every_epoch: bool = option("the same after each epoch too", False)

    def check(self) -> Settings:
        """Returns itself; raises ValueError, naming field and value, for what cannot be."""
        super().check()
        if self.quantize and self.method in ("full", "freeze"):
            raise ValueError(
                f"quantize is {self.quantize}, but packed weights cannot be trained by method {self.method!r}; take "
                "lora or ptuning, or leave quantize out."
            )
        if (self.predict or self.predict_every_epoch) and not self.eval_data:
            raise ValueError("predict needs questions to answer; give --eval-data.")
        return self

    @property
    def rate(self) -> float:
        """The highest learning rate, asked for or by method."""
        return self.learning_rate or LEARNING_RATES[self.method]


@functools.cache
def kind_of(settings: type[Options], name: str) -> tuple[type, bool, bool]:
    """(type of a value, whether it is a list, whether it may be None) of a field of `settings`."""
    hint = typing.get_type_hints(settings)[name]
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return parts[0], True, False
    optional = type(None) in parts
    return (parts[0] if optional else hint), False, optional


def _check_value(settings: type[Options], one: Any, value: Any) -> None:
    kind, several, optional = kind_of(settings, one.name)
    if value is None and optional:
        return
    values = value if several and isinstance(value, tuple) else (value,)
    if not all(_is(kind, single) for single in values):
        raise ValueError(f"{one.name} is {value!r}; it must be {'a list of ' * several}{_NAMES[kind]}.")
    choices = one.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{one.name} is {value!r}; it must be one of {', '.join(map(str, choices))}.")
    bounds = {"above": "greater than", "least": "at least", "below": "less than"}
    for bound, words in bounds.items():
        limit = one.metadata.get(bound)
        fits = {"above": lambda v, b: v > b, "least": lambda v, b: v >= b, "below": lambda v, b: v < b}[bound]
        if limit is not None and not fits(value, limit):
            raise ValueError(f"{one.name} is {value!r}; it must be {words} {limit}.")


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def read_yaml(file: Path, settings: type[Options] = Settings) -> dict[str, Any]:
    """The keys of a YAML file, as values of `settings`. Raises OSError or ValueError, naming what is wrong."""
    if not file.is_file():
        raise OSError(f"There is no file {file}; give a YAML file with the settings of the run.")
    try:
        keys = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(keys, dict):
        raise ValueError(f"{file} holds no settings; write lines like 'method: lora'.")
    return {name: _from_yaml(file, settings, name, value) for name, value in keys.items()}


def _from_yaml(file: Path, settings: type[Options], name: Any, value: Any) -> Any:
    known = [one.name for one in fields(settings)]
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise ValueError(f"{file} has an unknown key {name!r}; {meant}")
    kind, several, _ = kind_of(settings, name)
    if several and isinstance(value, str):
        return (value,)
    if several and isinstance(value, list):
        return tuple(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4, without a dot, as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def make_settings(config: Path | None, flags: Mapping[str, Any], settings: type[Chosen] = Settings) -> Chosen:
    """The settings of a YAML file, if there is one, and of flags, which win."""
    return replace(settings(), **(read_yaml(config, settings) if config else {}) | dict(flags))


def paths(names: tuple[str, ...]) -> list[Path]:
    """Names of files as they are found: `~` is the home of who calls."""
    return [Path(name).expanduser() for name in names]


def to_yaml(settings: Options) -> str:
    """All that was chosen, as a file that `read_yaml` reads."""
    keys = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.chosen().items()}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)
