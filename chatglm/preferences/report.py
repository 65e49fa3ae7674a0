"""What lies beside the trained weights: the curves as a picture, and a README.md that says how it was made."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl

from chatglm import __version__
from chatglm.preferences.settings import VALUE_HEAD, RewardSettings
from chatglm.training.processes import is_main
from chatglm.training.report import Outcome as RunOutcome
from chatglm.training.report import command_line, data_lines

CURVES = "curves.png"
REWARD = RewardSettings.command
Panels = Mapping[str, Mapping[str, str]]

README = """\
---
library_name: {library}
base_model: {model}
tags: [chatglm, trl, {command}]
---

# {model} after chatglm {command}

{use}

## How it was made

```sh
{line}
```

{trained:,} parameters were trained by {trainer}, beside {parameters:,} of the base, with a learning rate of {rate:g} at
most, in {steps} steps of {rows} {kind} each, {minutes:.1f} minutes{since} on {device} in {dtype}.

## Data

{data}

## Curves

{table}
{measured}{picture}
## Versions

chatglm {version}, torch {torch}, transformers {transformers}, TRL {trl}, PEFT {peft}, Python {python}.

## Licence

What was trained derives from {model} and stays under the licence of those weights ({licence}). Whether the data add
conditions is for those to say who chose them. A model that was taught what people prefer may also please where it
should contradict: ask it, before others do.
"""
ADAPTER = """\
```sh
chatglm convert {model} preferred --merge-adapter {folder}
chatglm chat preferred
```

PEFT loads it too: `PeftModel.from_pretrained(model, "{folder}")`."""
CLASSIFIER = """\
A reward model: it scores conversations, the higher the better.

```python
from chatglm.preferences.reward import load_reward_model

question, answer = {{"role": "user", "content": "你好"}}, {{"role": "assistant", "content": "你好！"}}
print(load_reward_model("{folder}").scores([[question, answer]]))
```

{form}"""
FORMS = {
    False: 'In transformers: `AutoModelForSequenceClassification.from_pretrained("{folder}")`.',
    True: "The weights are those of the RLHF fork's reward model: `transformer.*` and `v_head.weight`.",
}


@dataclass
class Outcome(RunOutcome):
    """What a run has found out, for its report."""

    measured: dict[str, float] = field(default_factory=dict)  # of held-out rows, at the end


def draw_curves(outcome: Outcome, panels: Panels, file: Path) -> bool:
    """Draws a panel for each entry of `panels`; returns whether matplotlib is there to do it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4 * len(panels), 3.2), dpi=80, layout="tight")
    FigureCanvasAgg(figure)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, label in curves.items():
            points = outcome.curve(name)
            if points:
                marker = "." if name.startswith("eval_") or len(points) == 1 else ""
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1, marker=marker)
        axes.set(xlabel="step", title=title)
        axes.title.set_fontsize(10)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(axes.lines) > 1:
            axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(file, metadata={"Software": None})
    return True


def curve_table(outcome: Outcome, panels: Panels) -> str:
    """First and last value of every curve."""
    rows = ["| | | first | last |", "|---|---|--:|--:|"]
    for title, curves in panels.items():
        for name, label in curves.items():
            values = [value for _, value in outcome.curve(name)]
            if values:
                rows.append(f"| {title} | {label} | {values[0]:.4g} | {values[-1]:.4g} |")
    return "\n".join(rows)


def tell(outcome: Outcome, panels: Panels) -> None:
    """Prints what came of a run, and what is done with it next; of several processes, the main one does."""
    if not is_main():
        return
    settings = outcome.settings
    print(curve_table(outcome, panels))
    print(measured_line(outcome), end="")
    what = "reward model" if settings.command == REWARD else "adapter"
    print(f"{settings.output}: the {what}, README.md and {CURVES}")
    if settings.command != REWARD:
        print(f"Next: chatglm convert {settings.model} preferred --merge-adapter {settings.output}")


def measured_line(outcome: Outcome) -> str:
    """What was measured on held-out rows at the end."""
    if not outcome.measured:
        return ""
    return (
        "Held-out rows at the end: " + ", ".join(f"{n} {v:.4g}" for n, v in outcome.measured.items()) + ".\n"
    )


def use(outcome: Outcome) -> str:
    """How the result is loaded."""
    names = {"model": outcome.settings.model, "folder": Path(outcome.settings.output).name}
    if outcome.settings.command != REWARD:
        return ADAPTER.format(**names)
    form = FORMS[outcome.settings.form == VALUE_HEAD].format(**names)
    return CLASSIFIER.format(**names, form=form)


def readme(task: Any, outcome: Outcome, licence: str, drawn: bool) -> str:
    """The README.md of the output folder of a Task."""
    settings = outcome.settings
    measured = measured_line(outcome)
    return README.format(
        model=settings.model,
        command=settings.command,
        library="transformers" if settings.command == REWARD else "peft",
        use=use(outcome),
        line=command_line(settings),
        trained=outcome.trained,
        trainer=f"TRL's {task.trainer_name}",
        parameters=outcome.parameters,
        rate=settings.rate,
        steps=outcome.steps,
        rows=settings.batch_size * settings.accumulation * outcome.processes,
        kind=task.rows_are,
        minutes=outcome.seconds / 60,
        since=f" since it was resumed after step {outcome.resumed_at}" if outcome.resumed_at else "",
        device=outcome.device,
        dtype=outcome.dtype,
        data=data_lines(outcome.data),
        table=curve_table(outcome, task.panels),
        measured=f"\n{measured}" if measured else "",
        picture=f"\n![curves by step]({CURVES})\n" if drawn else "",
        version=__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
        peft=peft.__version__,
        python=platform.python_version(),
        licence=licence,
    )
