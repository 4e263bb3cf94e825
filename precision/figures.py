"""A study's figures: the heat map of what hurts, and perplexity against bytes of the plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import expm1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.figures import STYLE, FiguresUnavailable
from precision.study import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("perplexity change, %", "nll_change", lambda value: 100 * expm1(value)),
    ("weight MSE / mean square, %", "weight_relative_mse", lambda value: 100 * value),
    ("1 - output cosine, %", "output_cosine", lambda value: 100 * (1 - value)),
)
MOST_NUMBERED = 40
"""Layers up to which every cell of the heat map holds its number."""


def draw(findings: Findings, folder: Path) -> list[Path]:
    """Writes `sensitivity.png` and `plans.png` into a folder and returns them.

    Raises:
        FiguresUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FiguresUnavailable("figures need matplotlib: pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with rc_context(STYLE):
        for name, fill in (("sensitivity", _heat_map), ("plans", _curve)):
            figure = Figure()
            fill(findings, figure)
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})
            written.append(folder / f"{name}.png")
    return written


def _heat_map(findings: Findings, figure: Figure) -> None:
    layers = list(dict.fromkeys(row["layer"] for row in findings.rows))
    parts = list(dict.fromkeys(row["part"] for row in findings.rows))
    figure.set_size_inches(max(9.0, 3 * (1.4 + 0.62 * len(parts))), 2.6 + 0.34 * len(layers))
    about = findings.about
    figure.suptitle(
        f"What {about['format']} does, one {about['by']} at a time\n{about['model']}, {about['dtype']} on {about['device']}, "
        f"{about['study_tokens']} tokens",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    for axes, (title, field, shown) in zip(
        figure.subplots(1, len(PANELS), squeeze=False)[0], PANELS, strict=True
    ):
        _panel(figure, axes, _cells(findings.rows, layers, parts, field, shown), field == "nll_change")
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(parts)), _short(parts), rotation=60, ha="right", fontsize=9)
        axes.set_yticks(range(len(layers)), layers, fontsize=9)
        axes.set_ylabel("layer")


def _cells(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[str], parts: Sequence[str], field: str, shown: Any
) -> list[list[float]]:
    """Returns the numbers of a panel, a line a layer; NaN where there is no unit."""
    found = {(row["layer"], row["part"]): row[field] for row in rows}
    values = [[found.get((layer, part)) for part in parts] for layer in layers]
    return [[float("nan") if value is None else shown(value) for value in line] for line in values]


def _panel(figure: Figure, axes: Axes, cells: list[list[float]], signed: bool) -> None:
    """Draws numbers as colours: white is zero, and where they are signed, blue is less."""
    most = max((abs(value) for line in cells for value in line if value == value), default=1.0) or 1.0
    low, colours = (-most, "RdBu_r") if signed else (0.0, "Reds")
    image = axes.imshow(cells, cmap=colours, vmin=low, vmax=most, aspect="auto")
    figure.colorbar(image, ax=axes, shrink=0.8)
    if len(cells) > MOST_NUMBERED:
        return
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            if value == value:
                colour = "white" if abs(value) > 0.65 * most else "black"
                axes.text(x, y, f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}", ha="center", va="center",
                          fontsize=7, color=colour)  # fmt: skip


def _short(parts: Sequence[str]) -> list[str]:
    """Returns each part's last word, or all of it where the last words of two are the same."""
    last = [part.rpartition(".")[2] for part in parts]
    return [word if last.count(word) == 1 else part for word, part in zip(last, parts, strict=True)]


def _curve(findings: Findings, figure: Figure) -> None:
    points, about = findings.points, findings.about
    figure.set_size_inches(9.0, 5.0)
    axes = figure.subplots()
    sizes = [point["bytes"] / 1e6 for point in points]
    changes = [100 * expm1(point["nll_change"]) for point in points]
    errors = [100 * (point["nll_change_error"] or 0.0) for point in points]
    plans = [
        index for index, point in enumerate(points) if any(name.startswith("plan") for name in point["names"])
    ]
    axes.plot([sizes[i] for i in (0, *plans)], [changes[i] for i in (0, *plans)], color="#d55e00", zorder=1)
    for index, point in enumerate(points):
        colour = "#d55e00" if index in plans else "#0072b2"
        axes.errorbar(sizes[index], changes[index], yerr=errors[index], fmt="o", color=colour, capsize=3)
        words = ", ".join(name.removeprefix("plan ") for name in point["names"])
        top = (sizes[index], changes[index] + errors[index])
        axes.annotate(
            words, top, xytext=(0, 6), textcoords="offset points", rotation=45, fontsize=9, color=colour
        )
    axes.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xlabel("MB of the linear layers' weights")
    axes.set_ylabel("perplexity change, %")
    axes.margins(x=0.12, y=0.35)
    setting = f"{about['model']}, {about['dtype']} on {about['device']}, {about['judge_tokens']} tokens that chose no plan"
    axes.set_title(
        f"Perplexity against bytes of precision plans (orange, by budget); whiskers: standard error\n{setting}",
        loc="left",
    )
