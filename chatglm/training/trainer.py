"""The few things that transformers' Trainer is told: arguments, how a prefix is saved, what is shown."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from chatglm.training.methods import save_prefix, training_dtype
from chatglm.training.processes import together, wait_for_all
from chatglm.training.report import Outcome
from chatglm.training.settings import Settings


class FinetuneTrainer(Trainer):
    """transformers' Trainer, saving a P-Tuning v2 prefix alone, as published, instead of the whole model."""

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Gives no more batches to a run that is resumed after its last step: Trainer would take another one."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.model.config.pre_seq_len:
            save_prefix(self.model, Path(output_dir or self.args.output_dir), state_dict)
        else:
            super()._save(output_dir, state_dict)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        wait_for_all()  # trainer_state.json, which is written next, tells that a checkpoint is complete


def training_arguments(
    settings: Settings,
    device: torch.device,
    watched: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """`settings` in the words of transformers, and `more` that a `kind` of its arguments has."""
    dtype = training_dtype(settings, device)
    eval_strategy = "no" if not watched else "steps" if settings.eval_steps else "epoch"
    arguments = kind(
        output_dir=settings.output,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(settings.batch_size, 4),
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.rate,
        lr_scheduler_type=settings.scheduler,
        # Below 1 it is a share, as it is here; transformers rounds it up.
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        **(more | _checkpointing(settings.gradient_checkpointing)),
        seed=settings.seed,
        # Autocast: what is trained stays in float32, and float16 gets its loss scaled.
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=device.type == "cpu",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy=eval_strategy,
        eval_steps=settings.eval_steps,
        eval_on_start=watched,
        prediction_loss_only=True,
        save_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,  # Progress shows the bar
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,  # every weight that is trained takes part in every loss
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several cards take accelerate launch, not DataParallel
    return arguments


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The option under its name in this release of transformers."""
    name = "activation_checkpointing"
    if name not in TrainingArguments.__dataclass_fields__:  # before 5.20
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def run_trainer(trainer: Trainer, start: Path | None, outcome: Outcome, say: Callable[[str], Any]) -> None:
    """Trains, from the checkpoint `start` or from the beginning, and notes in `outcome` what came of it."""
    if start:
        say(f"Going on after {start}.")
        trainer.args.eval_on_start = False  # it was done when the run began
        outcome.resumed_at = int(start.name.split("-")[1])
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    outcome.seconds, outcome.steps = time.perf_counter() - began, trainer.state.global_step
    outcome.log = trainer.state.log_history
    last = [name for entry in outcome.log if entry["step"] == outcome.steps for name in entry]
    if trainer.eval_dataset is not None and not any(name.startswith("eval_") for name in last):
        trainer.evaluate()


class Progress(ProgressCallback):
    """The progress bar of transformers with the newest losses beside it, not a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "eval_data_loss": "evaluation", "eval_probe_loss": "probe"}
        self.shown |= {names[key]: f"{value:.3f}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


class StopAtNonsense(TrainerCallback):
    """Ends a run whose loss is no number any more, before it overwrites good checkpoints."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            with together():
                raise ValueError(
                    f"The loss became {loss} before step {state.global_step}; lower learning_rate (it is "
                    f"{args.learning_rate:g}), or take dtype bfloat16 or float32 if it is float16."
                )


class SaveAfterLooking(TrainerCallback):
    """Puts off a checkpoint at the end of an epoch until the watched losses were looked at and questions answered.

    A run that resumes there begins the next epoch: what it missed of the old one would be missing for good, and the
    random numbers of dropout would go on elsewhere.
    """

    put_off = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_off = control.should_save and state.epoch == round(state.epoch)
        if self.put_off:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.put_off:
            control.should_save, self.put_off = True, False


class AfterEachEpoch(TrainerCallback):
    """Calls a function with the number of the epoch that is over."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function(round(state.epoch))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; half-written ones, of a run that was killed, are removed."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:  # Trainer writes this file last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def check_processes(checkpoint: Path, processes: int) -> None:
    """Raises ValueError if another number of processes than `processes` made this checkpoint."""
    before = len(list(checkpoint.glob("rng_state*.pth")))  # Trainer writes one for each
    if before != processes:
        raise ValueError(
            f"{checkpoint} was made by {before} processes, but there are {processes} now; start {before}, or choose "
            "another output."
        )
