"""What lies beside the trained weights: the loss curve as a picture, and a README.md that says how it was made."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from chatglm import __version__
from chatglm.training.processes import number_of_processes
from chatglm.training.rows import Data
from chatglm.training.settings import Options

CURVES = {  # name in the log of the Trainer: name in the picture
    "loss": "training",
    "eval_data_loss": "evaluation data",
    "eval_probe_loss": "general questions",
}
USE = {
    "lora": """\
```sh
chatglm convert {model} merged --merge-adapter {folder}
chatglm chat merged
```

PEFT loads it too: `PeftModel.from_pretrained(model, "{folder}")`.""",
    "ptuning": """\
```sh
chatglm convert {model} with-prefix --prefix {folder}
chatglm chat with-prefix
```

The lines of the published finetuning guide load it too; `pre_seq_len` is {pre_seq_len}.""",
    "full": "```sh\nchatglm chat {folder}\n```",
}
USE["freeze"] = USE["full"]

README = """\
---
library_name: {library}
base_model: {model}
tags: [chatglm, {method}]
---

# {model}, finetuned by {what}

{use}

In Python, whatever the method: `chatglm.training.methods.load_finetuned("{folder}")`.

## How it was made

```sh
{command}
```

{trained:,} parameters were trained, beside {parameters:,} of the base, with a learning rate of {rate:g} at most,
in {steps} steps of {rows_per_step} {kind} each, {minutes:.1f} minutes{since} on {device} in {dtype}.

## Data

{data}

## Losses

{losses}

![loss by step](loss.png)
{scores}
## Versions

chatglm {version}, torch {torch}, transformers {transformers}{peft}, Python {python}.

## Licence

What was trained derives from {model} and stays under the licence of those weights ({licence}). Whether the data add
conditions is for those to say who chose them. Nothing is known here of what else the model may answer now: ask it,
before others do.
"""
TITLES = {
    "lora": "LoRA of rank {0.lora_rank}",
    "ptuning": "P-Tuning v2 with a prefix of {0.pre_seq_len}",
    "full": "training all weights",
    "freeze": "training the last {0.freeze_layers} layers",
}


@dataclass
class Outcome:
    """What a run has found out, for its report."""

    settings: Any
    device: str
    dtype: str
    processes: int = field(default_factory=number_of_processes)
    trained: int = 0
    parameters: int = 0
    steps: int = 0
    resumed_at: int = 0  # step
    seconds: float = 0.0  # since then
    data: dict[str, Data] = field(default_factory=dict)  # by what it is for
    log: list[dict[str, Any]] = field(default_factory=list)  # the Trainer's, with the scores of answers

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of something that the Trainer logs."""
        return [(entry["step"], entry[name]) for entry in self.log if entry.get(name) is not None]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The scores of answers to the evaluation data, by when they were given."""
        return {entry["after"]: entry["scores"] for entry in self.log if "scores" in entry}


def draw_losses(outcome: Outcome, file: Path) -> bool:
    """Draws all losses by step; returns whether matplotlib is there to do it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.5), dpi=80, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label in CURVES.items():
        points = outcome.curve(name)
        if points:
            axes.plot(
                *zip(*points, strict=True), label=label, linewidth=1, marker="." if name != "loss" else ""
            )
    axes.set(xlabel="step", ylabel="loss per token of the answers")
    if axes.lines:  # a run may be shorter than logging_steps
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Software": None})
    return True


def loss_table(outcome: Outcome) -> str:
    """First, lowest and last value of each loss."""
    rows = ["| loss | first | lowest | last |", "|---|--:|--:|--:|"]
    for name, label in CURVES.items():
        values = [value for _, value in outcome.curve(name)]
        if values:
            rows.append(f"| {label} | {values[0]:.4f} | {min(values):.4f} | {values[-1]:.4f} |")
    return "\n".join(rows)


def score_table(scores: dict[str, dict[str, float]]) -> str:
    """Scores by when they were measured."""
    if not scores:
        return ""
    names = list(next(iter(scores.values())))
    lines = [f"| after | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    lines += [
        f"| {when} | {' | '.join(f'{found[n]:.2f}' for n in names)} |" for when, found in scores.items()
    ]
    return "\n## Answers to the evaluation data\n\n" + "\n".join(lines) + "\n\nGreedy answers; per cent.\n"


def data_lines(data: dict[str, Data], places: int | None = 5) -> str:
    """How many rows of what, and what was wrong with them."""
    lines = []
    for purpose, found in data.items():
        used = found.records - found.problems.number_left_out
        lines.append(
            f"- {purpose}: {used:,} of {found.records:,} records used, fingerprint {found.fingerprint}"
        )
        lines += [f"  - {line}" for line in found.problems.lines(places)]
    return "\n".join(lines)


def command_line(settings: Options) -> str:
    """`chatglm COMMAND` with the flags that were chosen."""
    words = ["chatglm", settings.command, settings.model]
    for name, value in settings.chosen().items():
        if name == "model":
            continue
        flag = f"--{name.replace('_', '-')}"
        values: Sequence[Any] = () if value is True else value if isinstance(value, tuple) else (value,)
        words += [flag, *map(str, values)]
    return shlex.join(words)


def readme(outcome: Outcome, licence: str) -> str:
    """The README.md of the output folder."""
    settings = outcome.settings
    names = {
        "model": settings.model,
        "folder": Path(settings.output).name,
        "pre_seq_len": settings.pre_seq_len,
    }
    return README.format(
        **names,
        library="peft" if settings.method == "lora" else "transformers",
        method=settings.method,
        what=TITLES[settings.method].format(settings),
        use=USE[settings.method].format(**names),
        command=command_line(settings),
        trained=outcome.trained,
        parameters=outcome.parameters,
        rate=settings.rate,
        steps=outcome.steps,
        rows_per_step=settings.batch_size * settings.accumulation * outcome.processes,
        kind="packed sequences" if settings.packing else "rows",
        minutes=outcome.seconds / 60,
        since=f" since it was resumed after step {outcome.resumed_at}" if outcome.resumed_at else "",
        device=outcome.device,
        dtype=outcome.dtype,
        data=data_lines(outcome.data),
        losses=loss_table(outcome),
        scores=score_table(outcome.scores),
        version=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=_peft_version() if settings.method == "lora" else "",
        python=platform.python_version(),
        licence=licence,
    )


def _peft_version() -> str:
    import peft

    return f", peft {peft.__version__}"
