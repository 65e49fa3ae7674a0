"""Bar charts of measurements, with matplotlib, which is imported for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

OURS, OTHERS = "#2563a8", "#b4b9c2"
ENDINGS = (".png", ".svg")

Bar = tuple[str, float, bool]  # name, value, whether it is ours


def check_chart(path: Path) -> None:
    """Raises ValueError or OSError unless a chart can be written to `path`."""
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"The chart {path} is neither a .png nor a .svg file; name one of the two.")
    if find_spec("matplotlib") is None:
        raise ValueError("Charts need matplotlib, which is not installed; pip install matplotlib.")


def draw_bars(path: Path, title: str, panels: Sequence[tuple[str, Sequence[Bar]]]) -> None:
    """Writes panels of (label of the axis, bars) side by side to a .png or .svg file."""
    import matplotlib
    from matplotlib.figure import Figure

    longest = max(len(bars) for _, bars in panels)
    with matplotlib.rc_context({"svg.hashsalt": "chatglm", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2 * len(panels), 0.9 + 0.3 * longest), dpi=150)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (label, bars) in zip(axes, panels, strict=True):
            names, values, ours = zip(*bars[::-1], strict=True)
            drawn = axis.barh(names, values, color=[OURS if own else OTHERS for own in ours])
            axis.bar_label(drawn, fmt=three_digits, padding=3)
            axis.set_xlabel(label)
            axis.margins(x=0.12)
            axis.set_ylim(len(bars) - longest - 0.6, len(bars) - 0.4)  # bars of one width in all panels
            axis.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title)
        figure.tight_layout()
        dated = {"Date": None} if path.suffix.lower() == ".svg" else {}  # the same figures, the same file
        figure.savefig(path, metadata=dated)


def three_digits(value: float) -> str:
    """A number for people: 0.0120, 1.20, 12.0, 120, 1,200."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
