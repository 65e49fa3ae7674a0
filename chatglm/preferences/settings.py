"""What a run that learns from preferences is asked to do; the fields are keys of the YAML and flags of the commands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from chatglm.training.processes import number_of_processes
from chatglm.training.settings import Options, Settings, option

# By common practice for models of 6 billion parameters; docs/preferences.md has what was measured on small ones.
REWARD_RATES = {"lora": 1e-4, "full": 1e-5}
DPO_RATE, RL_RATE = 5e-6, 1e-5
CLASSIFIER, VALUE_HEAD = "classifier", "value-head"


def same(name: str) -> Any:
    """A field as `chatglm finetune` has it."""
    one = Settings.__dataclass_fields__[name]
    return field(default=one.default, metadata=one.metadata)


QUANTIZE = option("pack the base into so many bits", choices=(8, 4))


@dataclass(frozen=True)
class PreferenceSettings(Options):
    """What the three commands have in common."""

    method = "lora"  # no field here: only a reward model has a choice
    default_rate: ClassVar[float]

    model: str = same("model")
    revision: str | None = same("revision")
    output: str = same("output")
    # data
    data: tuple[str, ...] = same("data")
    eval_data: tuple[str, ...] = option("files to measure with, before, while and after it learns", ())
    prompt_column: str | None = same("prompt_column")
    history_column: str | None = same("history_column")
    max_length: int = option("tokens of a row; longer rows are left out", 1024, above=8)
    max_rows: int | None = same("max_rows")
    max_eval_rows: int | None = option("measure with the first rows of the evaluation files alone", above=0)
    # model
    lora_rank: int = same("lora_rank")
    lora_alpha: float | None = same("lora_alpha")
    lora_dropout: float = same("lora_dropout")
    lora_target: tuple[str, ...] = same("lora_target")
    device: str | None = same("device")
    dtype: str | None = same("dtype")
    # training
    learning_rate: float | None = same("learning_rate")
    scheduler: str = same("scheduler")
    warmup: float = same("warmup")
    weight_decay: float = same("weight_decay")
    epochs: float = option("passes over the data", 1.0, above=0)
    max_steps: int | None = same("max_steps")
    batch_size: int = same("batch_size")
    accumulation: int = same("accumulation")
    gradient_checkpointing: bool = same("gradient_checkpointing")
    seed: int = same("seed")
    # watching
    logging_steps: int = option("steps between two points of the curves", 10, above=0)
    eval_steps: int | None = same("eval_steps")
    save_steps: int = same("save_steps")

    @property
    def rate(self) -> float:
        """The highest learning rate, asked for or usual."""
        return self.learning_rate or self.default_rate


@dataclass(frozen=True)
class RewardSettings(PreferenceSettings):
    """`chatglm train-reward`."""

    command: ClassVar[str] = "train-reward"

    # reward
    chosen_column: str | None = option("column of the better answers")
    rejected_column: str | None = option("column of the worse answers")
    method: str = option("what is trained beside the head", "lora", choices=tuple(REWARD_RATES))
    form: str = option(
        "how it is written: for AutoModelForSequenceClassification, or with the value head of the RLHF fork",
        CLASSIFIER,
        choices=(CLASSIFIER, VALUE_HEAD),
    )
    quantize: ClassVar[None] = None

    @property
    def default_rate(self) -> float:
        return REWARD_RATES[self.method]


@dataclass(frozen=True)
class DpoSettings(PreferenceSettings):
    """`chatglm dpo`."""

    command: ClassVar[str] = "dpo"
    default_rate: ClassVar[float] = DPO_RATE

    # dpo
    chosen_column: str | None = option("column of the better answers")
    rejected_column: str | None = option("column of the worse answers")
    beta: float = option("how strongly the model is held to what it was", 0.1, above=0)
    sft_weight: float = option(
        "of the loss of the better answers, which is added to that of DPO", 0.0, least=0
    )
    quantize: int | None = QUANTIZE


@dataclass(frozen=True)
class RlSettings(PreferenceSettings):
    """`chatglm rl`."""

    command: ClassVar[str] = "rl"
    default_rate: ClassVar[float] = RL_RATE

    # rl
    reward_model: str = option("folder that train-reward wrote, or a reward checkpoint of the RLHF fork", "")
    algorithm: str = option("how rewards become a gradient", "grpo", choices=("grpo", "rloo"))
    generations: int = option("answers to each prompt, which are compared with one another", 8, least=2)
    max_new_tokens: int = option("tokens of an answer; longer ones are broken off", 128, above=0)
    temperature: float = option("of sampling", 1.0, above=0)
    beta: float = option("price of KL divergence from the model as it was", 0.05, least=0)
    quantize: int | None = QUANTIZE

    def check(self) -> RlSettings:
        """Returns itself; raises ValueError, naming field and value, for what cannot be."""
        super().check()
        if not self.reward_model:
            raise ValueError("reward_model is missing; give --reward-model a folder that train-reward wrote.")
        processes = number_of_processes()
        together = self.batch_size * self.accumulation * processes
        if together % self.generations:
            times = f" times {processes} processes" if processes > 1 else ""
            raise ValueError(
                f"A step has batch_size {self.batch_size} times accumulation {self.accumulation}{times} = {together} "
                f"answers, which must be a multiple of generations, {self.generations}."
            )
        return self
