"""Reward models: a head that scores a whole conversation, trained on pairs of answers by TRL's RewardTrainer.

They are written in one of two forms, and read in both:

classifier   ChatGLMForSequenceClassification with one label: transformer.* and classifier_head.weight and .bias, for
             AutoModelForSequenceClassification
value-head   the form of the RLHF fork (sunzeyeah/RLHF, src/models/reward.py): transformer.* and v_head.weight [1, H]

Both score the last token that is no padding, which is the end of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForSequenceClassification
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.preferences.layout import Messages, lay_out_pairs
from chatglm.preferences.rows import PreferenceData
from chatglm.preferences.run import Task, execute, read_pair_data, trainer_class
from chatglm.preferences.settings import VALUE_HEAD, RewardSettings
from chatglm.training.methods import lora_config
from chatglm.weights.expected import HEAD
from chatglm.weights.read import read_state
from chatglm.weights.tensors import State

VALUE_HEAD_WEIGHT = "v_head.weight"
WEIGHTS_FILE = "pytorch_model.bin"  # the name that the fork writes and reads
ROWS_TOGETHER = 16  # that are scored at once


def train_reward(
    settings: RewardSettings,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> Any:
    """Trains a reward model on pairs and writes it into `settings.output`; returns the Outcome.

    The arguments and errors of `chatglm.training.finetune.finetune`.
    """
    return execute(RewardTask(settings), resume, overwrite, progress, say)


class RewardTask(Task):
    """What `chatglm train-reward` does its own way."""

    trainer_name, rows_are = "RewardTrainer", "pairs"
    panels = {
        "loss, -log σ(better - worse)": {"loss": "training", "eval_loss": "evaluation"},
        "share of pairs in the right order": {"accuracy": "training", "eval_accuracy": "evaluation"},
        "score of better - worse": {"margin": "training", "eval_margin": "evaluation"},
    }
    settings: RewardSettings

    def read(self) -> dict[str, PreferenceData]:
        return read_pair_data(self.settings)

    def lay_out(self, tokenizer: ChatGLMTokenizer, data: PreferenceData) -> list[dict[str, Messages]]:
        return lay_out_pairs(tokenizer, data, self.settings.max_length)

    def check(self, checkpoint: Checkpoint) -> None:
        bits = checkpoint.config.get("quantization_bit")
        if bits:
            raise ValueError(
                f"The weights of {self.settings.model} are packed to {bits} bits, which a reward model is not trained "
                "on; take the float checkpoint."
            )

    def load(self, checkpoint: Checkpoint, device: torch.device, dtype: str) -> nn.Module:
        """The base with a new head that scores everything 0 at first; what is trained is in float32."""
        config = ChatGLMConfig.from_dict(dict(checkpoint.config) | {"num_labels": 1})
        whole = self.settings.method == "full"
        model = ChatGLMForSequenceClassification.from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=torch.float32 if whole else getattr(torch, dtype),
            device_map={"": device},
        )
        model.classifier_head.float()
        if HEAD + "weight" not in read_state(file.path for file in checkpoint.weights):
            nn.init.zeros_(model.classifier_head.weight)
            nn.init.zeros_(model.classifier_head.bias)
        model.classifier_head.bias.requires_grad_(False)  # the same for both answers: it learns nothing
        return model

    def trainer(self, model: nn.Module, arguments: Callable[..., Any], **given: Any) -> Any:
        from trl import RewardConfig, RewardTrainer

        adapter = None
        if self.settings.method == "lora":
            adapter = lora_config(self.settings, "SEQ_CLS")
            adapter.modules_to_save = [HEAD.rstrip(".")]
        return trainer_class(RewardTrainer)(
            model=model, args=arguments(RewardConfig, max_length=None), peft_config=adapter, **given
        )

    def save(self, model: Any, tokenizer: ChatGLMTokenizer, folder: Path, dtype: torch.dtype) -> None:
        if self.settings.method == "lora":
            model = model.merge_and_unload()
        model.config.use_cache = True  # Trainer turned it off
        nn.init.zeros_(model.classifier_head.bias)  # noise of the optimizer: pairs tell nothing about it
        save_reward_model(model.to(dtype), tokenizer, folder, self.settings.form)

    def measure(
        self, model: Any, tokenizer: ChatGLMTokenizer, rows: list[dict[str, Messages]]
    ) -> dict[str, float]:
        """Held-out pairs in the right order, in per cent; equal scores are wrong."""
        scorer = RewardModel(model, tokenizer)
        better, worse = (
            scorer.scores([row["prompt"] + row[side] for row in rows]) for side in ("chosen", "rejected")
        )
        right = sum(good > bad for good, bad in zip(better, worse, strict=True))
        return {"pairs": len(rows), "in the right order, %": 100 * right / len(rows)}


class RewardModel:
    """Scores conversations that end in an answer."""

    def __init__(self, model: Any, tokenizer: ChatGLMTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.no_grad()
    def scores(
        self, conversations: Sequence[Messages], finished: Sequence[bool] | None = None
    ) -> list[float]:
        """A number for each conversation, the higher the better.

        Where `finished` is False the answer was broken off: the token that ends answers is not put behind it.
        Raises ValueError for a score that is no number.
        """
        self.model.eval()
        ids = [
            self.tokenizer.apply_chat_template(
                messages, return_dict=False, continue_final_message=finished is not None and not finished[i]
            )
            for i, messages in enumerate(conversations)
        ]
        found = [score for rows in _together(ids) for score in self._scores(rows)]
        if not all(map(math.isfinite, found)):
            raise ValueError(
                "The reward model gives a score that is no number: its weights are damaged, or float16 overflowed; "
                "train it again, or load it in float32."
            )
        return found

    def _scores(self, rows: list[list[int]]) -> list[float]:
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        inputs = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        dtype = next(self.model.parameters()).dtype
        # The head of a model in training is in float32.
        with torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32):
            return self.model(**inputs, use_cache=False).logits[:, 0].float().tolist()


def _together(rows: list[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(rows), ROWS_TOGETHER):
        yield rows[start : start + ROWS_TOGETHER]


def load_reward_model(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RewardModel:
    """A reward model in either form, ready to score.

    Raises OSError and ValueError for folders that hold none, before weights are read. No code of the folder runs.
    """
    checkpoint, state = read_reward_model(folder)
    config = ChatGLMConfig.from_dict(dict(checkpoint.config) | {"num_labels": 1})
    if VALUE_HEAD_WEIGHT in state:
        tensors = {name: tensor.load() for name, tensor in as_classifier(state).items()}
        model = ChatGLMForSequenceClassification.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype
        )
    else:
        model = ChatGLMForSequenceClassification.from_pretrained(
            checkpoint.folder, config=config, dtype=dtype
        )
    return RewardModel(model.to(device).eval(), ChatGLMTokenizer.from_pretrained(checkpoint.folder))


def read_reward_model(folder: str | Path) -> tuple[Checkpoint, State]:
    """What a folder with a reward model holds; no weights are read yet.

    Raises OSError and ValueError for folders that hold none.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise OSError(f"There is no folder {folder}; give one that chatglm train-reward wrote.")
    checkpoint = read_checkpoint(folder)
    state = read_state(file.path for file in checkpoint.weights)
    head = state.get(VALUE_HEAD_WEIGHT) or state.get(f"{HEAD}weight")
    expected = (1, checkpoint.config.get("hidden_size", 4096))
    if head is None:
        raise ValueError(
            f"{folder} holds no reward model: it has neither {HEAD}weight nor {VALUE_HEAD_WEIGHT}; train one with "
            "chatglm train-reward."
        )
    if head.shape != expected:
        raise ValueError(
            f"The head in {folder} has shape {head.shape}, but that of a reward model has {expected}; take a model "
            "that was trained by chatglm train-reward."
        )
    return checkpoint, state


def as_classifier(state: State) -> State:
    """The tensors of a value-head checkpoint under the names of ChatGLMForSequenceClassification."""
    head = state[VALUE_HEAD_WEIGHT]
    kept = {name: tensor for name, tensor in state.items() if name != VALUE_HEAD_WEIGHT}
    return kept | {f"{HEAD}weight": head}


def save_reward_model(
    model: ChatGLMForSequenceClassification, tokenizer: ChatGLMTokenizer, folder: Path, form: str
) -> None:
    """Writes a reward model and its tokenizer into `folder`, in one of the two forms."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if form != VALUE_HEAD:
        model.save_pretrained(folder)
        return
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    state[VALUE_HEAD_WEIGHT] = state.pop(f"{HEAD}weight")
    del state[f"{HEAD}bias"]  # the head of the fork has none, and it moves all scores alike
    torch.save(state, folder / WEIGHTS_FILE)
    model.config.save_pretrained(folder)
