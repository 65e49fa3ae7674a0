"""A whole run: check, read, load, train, answer, save, report. The loop itself is transformers' Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.find import find_checkpoint
from chatglm.training.folder import begin, check_output, check_same_data, check_same_run, go_on, result
from chatglm.training.processes import is_main, number_of_processes, on_main, together
from chatglm.training.rows import Data, read_data
from chatglm.training.settings import Settings, paths

GENERAL_QUESTIONS = Path(__file__).with_name("probe.jsonl")


def finetune(
    settings: Settings,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> Any:
    """Teaches a model what the data say and writes the result into `settings.output`; returns the Outcome.

    Args:
        resume: goes on after the last checkpoint in the output, with the same settings and data.
        overwrite: replaces what an earlier run wrote there.
        progress: shows a bar.
        say: takes what people should know on the way, line by line.

    Raises OSError and ValueError, for settings, data, models and folders, before anything is loaded or written.
    """
    if not is_main():
        progress, say = False, say_nothing
    with together():
        checkpoint, device, data, examples = _check(settings, resume, overwrite)
    tell_data(data, say)

    import transformers

    from chatglm.training import methods

    output = Path(settings.output).expanduser()
    usual = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # Trainer misses the frozen weights in a P-Tuning checkpoint
    if not is_main():
        transformers.logging.disable_progress_bar()
    try:
        with together():
            model, tokenizer = methods.load_base(settings, device)
            transformers.set_seed(settings.seed)
            model = methods.prepare(model, settings)
        start = on_main(lambda: go_on(output)) if resume else None
        if not resume:
            on_main(lambda: begin(output, settings, data))
        run = _Run(settings, checkpoint, model, tokenizer, data, examples, device, progress, say)
        return run.train(start)
    finally:
        transformers.logging.set_verbosity(usual)


def say_nothing(line: str) -> None:
    """Takes what the main process says, in the others."""


def place(device: Any) -> str:
    """Where a run computes, in words."""
    processes = number_of_processes()
    return str(device) if processes == 1 else f"{processes} processes on {device.type}"


def _check(
    settings: Settings, resume: bool, overwrite: bool
) -> tuple[Checkpoint, Any, dict[str, Data], dict[str, list[Any]]]:
    """(checkpoint, device, rows, rows as tokens) of a run that can be done; raises before the model is loaded."""
    settings.check()
    output = check_output(settings, resume, overwrite)
    data = read_all(settings)
    if resume:
        check_same_run(output, settings)
    checkpoint = read_checkpoint(find_checkpoint(settings.model, settings.revision))

    from chatglm.training import methods

    device = methods.training_device(settings.device)
    methods.check_method(settings, checkpoint.config, device)
    if settings.predict or settings.predict_every_epoch:
        from chatglm.training.scores import check_scores

        check_scores()
    examples = lay_out(settings, checkpoint, data)
    if resume:
        check_same_data(output, data)
    return checkpoint, device, data, examples


def read_all(settings: Settings) -> dict[str, Data]:
    """The rows of every purpose: training, evaluation, general questions."""
    columns = {
        "prompt_column": settings.prompt_column,
        "response_column": settings.response_column,
        "history_column": settings.history_column,
    }
    data = {
        "training": read_data(
            paths(settings.data), **columns, every_turn=settings.every_turn, most_rows=settings.max_rows
        )
    }
    if settings.eval_data:
        data["evaluation"] = read_data(paths(settings.eval_data), **columns, most_rows=settings.max_eval_rows)
    if settings.probe != "none":
        data["general questions"] = read_data([Path(settings.probe or GENERAL_QUESTIONS).expanduser()])
    return data


def lay_out(settings: Settings, checkpoint: Checkpoint, data: dict[str, Data]) -> dict[str, list[Any]]:
    """Token ids and labels of all rows, by purpose."""
    from chatglm.hub.tokenization_chatglm import CHATGLM, ChatGLMTokenizer
    from chatglm.training.layout import Layout, pack

    tokenizer = ChatGLMTokenizer.from_pretrained(checkpoint.folder)
    if settings.packing and tokenizer.family == CHATGLM:
        raise ValueError(
            f"packing is for ChatGLM2-6B, but {settings.model} is a ChatGLM-6B, which reads each prompt in both "
            "directions; leave packing out."
        )
    layout = Layout(tokenizer, settings.max_source_length, settings.max_target_length)
    examples = {purpose: layout.examples(found, found.problems) for purpose, found in data.items()}
    for purpose, rows in examples.items():
        if not rows:
            raise ValueError(
                f"The {purpose} data hold no row with an answer that has tokens; look at the answers."
            )
    if settings.packing:
        examples["training"] = pack(examples["training"], layout.longest, settings.seed)
    return examples


def tell_data(data: dict[str, Data], say: Callable[[str], Any]) -> None:
    """Says how many rows there are, and what is wrong with the others."""
    from chatglm.training.report import data_lines

    for line in data_lines(data, places=3).splitlines():
        say(line.removeprefix("- "))


class _Run:
    """The part of a run that has a model."""

    def __init__(
        self,
        settings: Settings,
        checkpoint: Checkpoint,
        model: Any,
        tokenizer: Any,
        data: dict[str, Data],
        examples: dict[str, list[Any]],
        device: Any,
        progress: bool,
        say: Callable[[str], Any],
    ) -> None:
        from transformers import PrinterCallback

        from chatglm.training.layout import Collator
        from chatglm.training.methods import training_dtype
        from chatglm.training.report import Outcome
        from chatglm.training.trainer import (
            AfterEachEpoch,
            FinetuneTrainer,
            Progress,
            SaveAfterLooking,
            StopAtNonsense,
            training_arguments,
        )

        self.settings, self.checkpoint, self.model, self.tokenizer = settings, checkpoint, model, tokenizer
        self.data, self.progress, self.say = data, progress, say
        self.output = Path(settings.output).expanduser()
        self.outcome = Outcome(settings, place(device), training_dtype(settings, device), data=data)
        self.outcome.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.outcome.parameters = checkpoint.sizes.parameters
        watched = {"data": examples.get("evaluation"), "probe": examples.get("general questions")}
        watched = {name: rows for name, rows in watched.items() if rows}
        self.trainer = FinetuneTrainer(
            model=model,
            args=training_arguments(settings, device, bool(watched)),
            train_dataset=examples["training"],
            eval_dataset=watched or None,
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=[StopAtNonsense(), SaveAfterLooking(), *([Progress()] if progress else [])],
        )
        self.trainer.remove_callback(PrinterCallback)
        if settings.predict_every_epoch:
            self.trainer.add_callback(AfterEachEpoch(lambda epoch: self.predict(f"epoch {epoch}")))

    def train(self, start: Path | None) -> Any:
        """Trains, from a checkpoint or from the beginning, and writes everything."""
        from chatglm.training.trainer import run_trainer

        outcome, settings = self.outcome, self.settings
        self.say(
            f"{settings.method}: {outcome.trained:,} parameters are trained, beside {outcome.parameters:,} of the "
            f"base, in {outcome.dtype} on {outcome.device}."
        )
        run_trainer(self.trainer, start, outcome, self.say)
        if settings.predict:
            self.predict("the last step")
        self._write()
        return outcome

    def predict(self, when: str) -> None:
        """Answers the evaluation questions and scores the answers."""
        from chatglm.training.scores import answer, expected_answers, score, write_predictions

        rows = self.data["evaluation"].rows
        expected = expected_answers(self.tokenizer, rows)
        answers = answer(self.model, self.tokenizer, rows, self.settings.max_target_length, self.progress)
        # In the log of the Trainer, so that they are in its checkpoints.
        log = {"step": self.trainer.state.global_step, "after": when, "scores": score(expected, answers)}
        self.trainer.state.log_history.append(log)
        file = self.output / "generated_predictions.txt"
        on_main(lambda: write_predictions(file, expected, answers))

    def _write(self) -> None:
        """Puts the result beside the checkpoints, whole or not at all, README.md last."""
        weights = self.trainer.accelerator.get_state_dict(
            self.trainer.model_wrapped
        )  # all processes give theirs
        on_main(lambda: self._write_files(weights))

    def _write_files(self, weights: dict[str, Any]) -> None:
        from chatglm.training.report import draw_losses, readme

        with result(self.output) as folder:
            self._save(weights, folder)
            text = readme(self.outcome, licence_of(self.checkpoint.folder))
            if not draw_losses(self.outcome, folder / "loss.png"):
                text = text.replace("![loss by step](loss.png)\n", "")
                self.say("There is no picture of the loss without matplotlib; pip install matplotlib.")
            (folder / "README.md").write_text(text, encoding="utf-8")

    def _save(self, weights: dict[str, Any], folder: Path) -> None:
        from chatglm.training.methods import save_checkpoint, save_prefix, stored_dtype

        model = self.trainer.model
        if self.settings.method == "ptuning":
            save_prefix(model, folder, weights)
            return
        model.config.use_cache = True  # Trainer turned it off
        if self.settings.method == "lora":
            model.save_pretrained(folder, state_dict=weights)
            return
        save_checkpoint(model, weights, folder, stored_dtype(self.checkpoint.config))
        self.tokenizer.save_pretrained(folder)


def licence_of(folder: Path) -> str:
    """What the folder of a model says of its licence."""
    card = folder / "README.md"
    head = card.read_text(encoding="utf-8", errors="replace")[:4000] if card.is_file() else ""
    named = re.search(r"(?m)^license:\s*(\S.*)$", head)
    if named and named[1].strip() != "other":
        return named[1].strip()
    return "its MODEL_LICENSE" if (folder / "MODEL_LICENSE").is_file() else "not named in its folder"
