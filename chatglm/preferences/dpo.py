"""DPO by TRL's DPOTrainer: LoRA factors learn to prefer the better answers; the reference is the model without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chatglm.checkpoint import Checkpoint
from chatglm.preferences.layout import Messages, lay_out_pairs
from chatglm.preferences.rows import PreferenceData
from chatglm.preferences.run import Task, check_plain_head, execute, read_pair_data, trainer_class
from chatglm.preferences.settings import DpoSettings
from chatglm.training.methods import load_base, lora_config


def dpo(
    settings: DpoSettings,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> Any:
    """Teaches a model which of two answers is better and writes a LoRA adapter into `settings.output`.

    Returns the Outcome. The arguments and errors of `chatglm.training.finetune.finetune`.
    """
    return execute(DpoTask(settings), resume, overwrite, progress, say)


class DpoTask(Task):
    """What `chatglm dpo` does its own way."""

    trainer_name, rows_are = "DPOTrainer", "pairs"
    panels = {
        "loss, -log σ(margin)": {"loss": "training", "eval_loss": "evaluation"},
        "share of pairs in the right order": {
            "rewards/accuracies": "training",
            "eval_rewards/accuracies": "evaluation",
        },
        "β log(π / π without adapter)": {
            "rewards/chosen": "better, training",
            "rewards/rejected": "worse, training",
            "eval_rewards/chosen": "better, evaluation",
            "eval_rewards/rejected": "worse, evaluation",
        },
    }
    settings: DpoSettings

    def read(self) -> dict[str, PreferenceData]:
        return read_pair_data(self.settings)

    def lay_out(self, tokenizer: Any, data: PreferenceData) -> list[dict[str, Messages]]:
        return lay_out_pairs(tokenizer, data, self.settings.max_length)

    def check(self, checkpoint: Checkpoint) -> None:
        check_plain_head(self.settings.model, checkpoint)

    def load(self, checkpoint: Checkpoint, device: Any, dtype: str) -> Any:
        model, _ = load_base(self.settings, device)
        return model

    def losses(self) -> dict[str, list]:
        """What is added up: DPO's own loss, and perhaps the mean over the tokens of the better answers."""
        weight = self.settings.sft_weight
        return {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]} if weight else {}

    def trainer(self, model: Any, arguments: Callable[..., Any], **given: Any) -> Any:
        from trl import DPOConfig, DPOTrainer

        # Given the configuration of the adapter, not a model that has one already, TRL takes the model without it as
        # the reference; it would keep a copy of an adapter that is there.
        return trainer_class(DPOTrainer)(
            model=model,
            args=arguments(DPOConfig, beta=self.settings.beta, max_length=None, **self.losses()),
            peft_config=lora_config(self.settings, "CAUSAL_LM"),
            **given,
        )
