"""The picture beside a benchmark's table: bars for values by name, curves for values over something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

# Inches: readable on half a page.
_SIZE = (8.0, 4.5)


def bars(path: Path, title: str, unit: str, values: Mapping[str, float]) -> None:
    """A horizontal bar for each value, in the order given, with its number beside it. path: of a PNG."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(list(values), list(values.values()))
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=title, xlabel=unit)
    _save(figure, path)


def curves(
    path: Path,
    title: str,
    labels: tuple[str, str],
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    logarithmic: bool = False,
) -> None:
    """A line with its name for each series of (x, y). labels: of the axes. logarithmic: both. path: of a PNG."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
    if logarithmic:
        axes.set(xscale="log", yscale="log")
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date and a version of the program inside, the same figures make the same file.
    figure.savefig(path, dpi=100, metadata={"Software": None})
