"""Reinforcement learning by TRL's GRPOTrainer or RLOOTrainer: the model answers, a reward model scores, LoRA learns.

Both compare several answers to the same prompt with one another, and so need no value model; TRL has no PPO any more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatglm.checkpoint import Checkpoint
from chatglm.preferences.layout import Messages, lay_out_prompts
from chatglm.preferences.reward import RewardModel, load_reward_model, read_reward_model
from chatglm.preferences.rows import PreferenceData, read_prompts
from chatglm.preferences.run import Task, check_plain_head, execute, trainer_class
from chatglm.preferences.settings import RlSettings
from chatglm.training.methods import load_base, lora_config
from chatglm.training.settings import paths


def rl(
    settings: RlSettings,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> Any:
    """Teaches a model to answer as a reward model likes and writes a LoRA adapter into `settings.output`.

    Returns the Outcome. The arguments and errors of `chatglm.training.finetune.finetune`.
    """
    return execute(RlTask(settings), resume, overwrite, progress, say)


def reward_function(model: RewardModel, end_token_ids: set[int]) -> Callable[..., list[float]]:
    """The reward of an answer as TRL asks for it: the score of the conversation that it ends."""

    def score(
        prompts: list[Messages],
        completions: list[Messages],
        completion_ids: list[list[int]],
        **kwargs: Any,
    ) -> list[float]:
        conversations = [prompt + answer for prompt, answer in zip(prompts, completions, strict=True)]
        return model.scores(conversations, [ids[-1] in end_token_ids for ids in completion_ids])

    return score


class RlTask(Task):
    """What `chatglm rl` does its own way."""

    rows_are = "answers"
    panels = {
        "reward": {"reward": "training", "eval_reward": "evaluation"},
        "KL from the model without adapter, per token": {"kl": "training", "eval_kl": "evaluation"},
        "tokens of an answer": {
            "completions/mean_length": "training",
            "eval_completions/mean_length": "evaluation",
        },
    }
    settings: RlSettings

    @property
    def trainer_name(self) -> str:
        return f"{self.settings.algorithm.upper()}Trainer"

    def read(self) -> dict[str, PreferenceData]:
        asked, columns = self.settings, {}
        for name in ("prompt_column", "history_column"):
            columns[name] = getattr(asked, name)
        data = {"training": read_prompts(paths(asked.data), **columns, most_rows=asked.max_rows)}
        if asked.eval_data:
            data["evaluation"] = read_prompts(
                paths(asked.eval_data), **columns, most_rows=asked.max_eval_rows
            )
        return data

    def lay_out(self, tokenizer: Any, data: PreferenceData) -> list[dict[str, Messages]]:
        return lay_out_prompts(tokenizer, data, self.settings.max_length)

    def check(self, checkpoint: Checkpoint) -> None:
        check_plain_head(self.settings.model, checkpoint)
        read_reward_model(Path(self.settings.reward_model))

    def load(self, checkpoint: Checkpoint, device: Any, dtype: str) -> Any:
        model, _ = load_base(self.settings, device)
        self.reward = load_reward_model(self.settings.reward_model, device, model.dtype)
        return model

    def trainer(self, model: Any, arguments: Callable[..., Any], **given: Any) -> Any:
        import trl

        config = getattr(trl, f"{self.settings.algorithm.upper()}Config")
        tokenizer = given["processing_class"]
        return trainer_class(getattr(trl, self.trainer_name))(
            model=model,
            reward_funcs=reward_function(self.reward, {tokenizer.eos_token_id}),
            args=arguments(
                config,
                beta=self.settings.beta,
                num_generations=self.settings.generations,
                num_generations_eval=1,
                max_completion_length=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
            ),
            peft_config=lora_config(self.settings, "CAUSAL_LM"),
            **given,
        )
