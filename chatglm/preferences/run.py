"""A whole run of train-reward, dpo or rl: check, read, load, train, measure, save, report. The loops are TRL's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.find import find_checkpoint
from chatglm.preferences.rows import PreferenceData, read_pairs
from chatglm.preferences.settings import PreferenceSettings
from chatglm.training.finetune import licence_of, place, say_nothing, tell_data
from chatglm.training.folder import begin, check_output, check_same_data, check_same_run, go_on, result
from chatglm.training.processes import is_main, is_sharded, on_main, together
from chatglm.training.settings import paths


class Task:
    """What one of the commands does its own way; `execute` does the rest."""

    trainer_name: str  # of TRL's class
    rows_are: ClassVar[str]  # what a batch is of
    panels: ClassVar[dict[str, dict[str, str]]]  # curves by picture: name in the log of the Trainer -> label

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings

    def read(self) -> dict[str, PreferenceData]:
        """The rows by what they are for: training, and perhaps evaluation."""
        raise NotImplementedError

    def lay_out(self, tokenizer: Any, data: PreferenceData) -> list[dict[str, Any]]:
        """Rows as the trainer takes them; those that are too long are counted in `data`."""
        raise NotImplementedError

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises OSError or ValueError for what cannot be done with this model."""

    def load(self, checkpoint: Checkpoint, device: Any, dtype: str) -> Any:
        """The model to train."""
        raise NotImplementedError

    def trainer(self, model: Any, arguments: Callable[..., Any], **given: Any) -> Any:
        """TRL's trainer, with `arguments` of its kind and what else is `given`."""
        raise NotImplementedError

    def measure(self, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
        """What the trained model achieves on held-out rows, beyond what the trainer logs."""
        return {}

    def save(self, model: Any, tokenizer: Any, folder: Path, dtype: Any) -> None:
        """Writes what was learned; `dtype` is that of the base."""
        model.save_pretrained(folder)


def execute(task: Task, resume: bool, overwrite: bool, progress: bool, say: Callable[[str], Any]) -> Any:
    """Does what the settings of `task` ask for; returns the Outcome. See `chatglm.training.finetune.finetune`."""
    if not is_main():
        progress, say = False, say_nothing
    with together():
        checkpoint, device, tokenizer, data, rows = _check(task, resume, overwrite, say)

    import datasets
    import transformers

    from chatglm.training import methods

    settings, output = task.settings, Path(task.settings.output).expanduser()
    usual, bars = transformers.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()  # Trainer tells of tokens that a config has no place for
    datasets.disable_progress_bars()  # a moment each
    if not is_main():
        transformers.logging.disable_progress_bar()
    try:
        with together():
            transformers.set_seed(settings.seed)
            model = task.load(checkpoint, device, methods.training_dtype(settings, device))
        start = on_main(lambda: go_on(output)) if resume else None
        if not resume:
            on_main(lambda: begin(output, settings, data))
        return _Run(task, checkpoint, model, tokenizer, data, rows, device, progress, say).train(start)
    finally:
        transformers.logging.set_verbosity(usual)
        if bars:
            datasets.enable_progress_bars()


def _check(
    task: Task, resume: bool, overwrite: bool, say: Callable[[str], Any]
) -> tuple[Checkpoint, Any, Any, dict[str, PreferenceData], dict[str, list[dict[str, Any]]]]:
    """(checkpoint, device, tokenizer, data, rows) of a run that can be done; raises before the model is loaded."""
    settings = task.settings.check()
    if is_sharded():
        raise ValueError(
            f"chatglm {settings.command} gives every GPU a copy of the model; start it with accelerate launch "
            "--multi_gpu, without FSDP and DeepSpeed."
        )
    check_libraries()
    output = check_output(settings, resume, overwrite)
    data = task.read()
    if resume:
        check_same_run(output, settings)
    checkpoint = read_checkpoint(find_checkpoint(settings.model, settings.revision))
    task.check(checkpoint)

    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
    from chatglm.training import methods

    device = methods.training_device(settings.device)
    methods.check_method(settings, checkpoint.config, device)
    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint.folder)
    rows = {purpose: task.lay_out(tokenizer, found) for purpose, found in data.items()}
    tell_data(data, say)
    for purpose in rows:
        if not rows[purpose]:
            raise ValueError(f"The {purpose} data hold no row that fits; look at the lines above.")
    if resume:
        check_same_data(output, data)
    return checkpoint, device, tokenizer, data, rows


def check_libraries() -> None:
    """Raises ValueError if TRL or PEFT is missing."""
    missing = [name for name in ("trl", "peft") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Learning from preferences needs {' and '.join(missing)}, which is not installed; pip install "
            f"{' '.join(missing)}, on Python 3.11 or newer."
        )


def check_plain_head(name: str, checkpoint: Checkpoint) -> None:
    """Raises ValueError for a packed output layer: TRL multiplies with its weight, without asking the layer."""
    if checkpoint.config.get("quantization_embeddings"):
        raise ValueError(
            f"The output layer of {name} is packed, which TRL cannot compute with; take a checkpoint with plain "
            "embeddings, and pack it with --quantize."
        )


def read_pair_data(settings: Any) -> dict[str, PreferenceData]:
    """The pairs of a run, by what they are for."""
    columns = {
        name: getattr(settings, name)
        for name in ("prompt_column", "chosen_column", "rejected_column", "history_column")
    }
    data = {"training": read_pairs(paths(settings.data), **columns, most_rows=settings.max_rows)}
    if settings.eval_data:
        data["evaluation"] = read_pairs(
            paths(settings.eval_data), **columns, most_rows=settings.max_eval_rows
        )
    return data


def trainer_class(trainer: type) -> type:
    """A trainer of TRL without what it does unasked: a report of its use to the Hub, and a model card of its own."""

    class Quiet(trainer):  # type: ignore[misc, valid-type]
        def _send_telemetry(self) -> None:
            pass

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Quiet


class _Run:
    """The part of a run that has a model."""

    def __init__(
        self,
        task: Task,
        checkpoint: Checkpoint,
        model: Any,
        tokenizer: Any,
        data: dict[str, PreferenceData],
        rows: dict[str, list[dict[str, Any]]],
        device: Any,
        progress: bool,
        say: Callable[[str], Any],
    ) -> None:
        from datasets import Dataset
        from transformers import PrinterCallback

        from chatglm.preferences.report import Outcome
        from chatglm.training.methods import training_dtype
        from chatglm.training.trainer import Progress, SaveAfterLooking, StopAtNonsense, training_arguments

        self.task, self.checkpoint, self.tokenizer, self.rows = task, checkpoint, tokenizer, rows
        self.settings, self.say = task.settings, say
        self.output = Path(self.settings.output).expanduser()
        held_out = rows.get("evaluation")
        # TRL checkpoints gradients unless it is told not to.
        more = {"gradient_checkpointing": self.settings.gradient_checkpointing}
        self.trainer = task.trainer(
            model,
            arguments=partial(training_arguments, self.settings, device, bool(held_out), **more),
            train_dataset=Dataset.from_list(rows["training"]),
            eval_dataset=Dataset.from_list(held_out) if held_out else None,
            processing_class=tokenizer,
            callbacks=[StopAtNonsense(), SaveAfterLooking(), *([Progress()] if progress else [])],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.outcome = Outcome(self.settings, place(device), training_dtype(self.settings, device), data=data)
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.outcome.trained = sum(p.numel() for p in trained)
        self.outcome.parameters = checkpoint.sizes.parameters

    def train(self, start: Path | None) -> Any:
        """Trains, from a checkpoint or from the beginning, and writes everything."""
        from chatglm.training.trainer import run_trainer

        outcome = self.outcome
        self.say(
            f"{self.settings.command}: {outcome.trained:,} parameters are trained, beside {outcome.parameters:,} of "
            f"the base, in {outcome.dtype} on {outcome.device}."
        )
        run_trainer(self.trainer, start, outcome, self.say)
        if "evaluation" in self.rows:
            outcome.measured = on_main(self._measure)
        on_main(self._write)
        return outcome

    def _measure(self) -> dict[str, float]:
        return self.task.measure(self.trainer.model, self.tokenizer, self.rows["evaluation"])

    def _write(self) -> None:
        """Puts the result beside the checkpoints, whole or not at all, README.md last."""
        from chatglm.preferences.report import CURVES, draw_curves, readme
        from chatglm.training.methods import stored_dtype

        with result(self.output) as folder:
            dtype = stored_dtype(self.checkpoint.config)
            self.task.save(self.trainer.model, self.tokenizer, folder, dtype)
            drawn = draw_curves(self.outcome, self.task.panels, folder / CURVES)
            if not drawn:
                self.say("There is no picture of the curves without matplotlib; pip install matplotlib.")
            text = readme(self.task, self.outcome, licence_of(self.checkpoint.folder), drawn)
            (folder / "README.md").write_text(text, encoding="utf-8")
