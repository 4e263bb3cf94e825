"""Figures of lines and marks: speed over batch size, speed over the acceptance ratio, and prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

from benchmark.describe import dataset_label
from benchmark.figure_parts import SPEED_AXIS, WIDTH_INCHES, NothingToDraw, add_legend, speed_interval
from benchmark.saved_run import SavedRun, is_measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dvp"


def draw_throughput(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Tokens/s of the whole batch over the batch size, a line a technique with 95 % intervals, one panel a data set."""
    rows = run.ok_rows()
    if not rows:
        raise NothingToDraw("No cell of this run was measured, so there is no speed to draw.")
    sizes = tuple(sorted({int(row["batch_size"]) for row in rows}))
    datasets = [name for name in run.datasets if any(row["dataset"] == name for row in rows)]
    figure.set_size_inches(WIDTH_INCHES, 5.2)
    panels = figure.subplots(1, len(datasets), squeeze=False, sharex=True, sharey=True)[0]
    for dataset, axes in zip(datasets, panels, strict=True):
        for name, marker in zip(run.techniques, cycle(MARKERS), strict=False):
            _throughput_line(run, axes, name, dataset, colours[name], marker)
        axes.set_title(dataset_label(dataset), loc="left")
        axes.set_xlabel("batch size")
        axes.grid(color="#dddddd")
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(sizes, [str(size) for size in sizes])
    panels[0].minorticks_off()
    panels[0].set_ylabel(SPEED_AXIS)
    panels[0].set_ylim(bottom=0)
    add_legend(figure, panels)
    return sizes


def _throughput_line(run: SavedRun, axes: Axes, name: str, dataset: str, colour: str, marker: str) -> None:
    """Draws a technique's cells; a batch size it was not measured at leaves a gap in its line."""
    cells = [(size, run.row(name, dataset, size)) for size in run.batch_sizes]
    speeds = [float(row["tokens_per_s"]) if row and is_measured(row) else float("nan") for _, row in cells]
    if all(speed != speed for speed in speeds):
        return
    axes.plot(run.batch_sizes, speeds, color=colour, marker=marker, linewidth=2, label=name)
    for size, row in cells:
        interval = speed_interval(row) if row and is_measured(row) else None
        if interval is not None:
            axes.vlines(size, *interval, color=colour, linewidth=1.2)


def draw_acceptance_sweep(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Tokens/s against the acceptance ratio, the other techniques as horizontal lines, one panel a data set."""
    points = [point for point in run.sweep if point.get("tokens_per_s")]
    if not points:
        raise NothingToDraw("No point of the acceptance sweep was measured, so there is no speed to draw.")
    size = min(int(point.get("batch_size", 1)) for point in points)
    points = [point for point in points if point.get("batch_size", 1) == size]
    datasets = list(dict.fromkeys(str(point["dataset"]) for point in points))
    figure.set_size_inches(WIDTH_INCHES, 5.2)
    panels = figure.subplots(1, len(datasets), squeeze=False, sharey=True)[0]
    for dataset, axes in zip(datasets, panels, strict=True):
        _sweep_panel(run, axes, [point for point in points if point["dataset"] == dataset], size, colours)
        axes.set_title(dataset_label(dataset), loc="left")
    panels[0].set_ylabel(SPEED_AXIS)
    panels[0].set_ylim(bottom=0)
    add_legend(figure, panels)
    return (size,)


def _sweep_panel(
    run: SavedRun, axes: Axes, points: list[Mapping[str, Any]], size: int, colours: Mapping[str, str]
) -> None:
    dataset, swept = str(points[0]["dataset"]), list(dict.fromkeys(str(p["model_type"]) for p in points))
    for name in run.techniques:
        row = run.row(name, dataset, size)
        if name not in swept and row is not None and is_measured(row):
            axes.axhline(
                float(row["tokens_per_s"]), color=colours[name], linewidth=1.8, linestyle="--", label=name
            )
    for name in swept:
        line = sorted((p["acceptance_ratio"], p["tokens_per_s"]) for p in points if p["model_type"] == name)
        axes.plot(
            *zip(*line, strict=True), color=colours[name], marker="o", linewidth=2.4, label=f"{name}, swept"
        )
        row = run.row(name, dataset, size)
        if row is not None and is_measured(row):
            label = f"{name}, as trained"
            axes.axhline(
                float(row["tokens_per_s"]), color=colours[name], linewidth=1.2, linestyle=":", label=label
            )
    axes.set_xlabel("acceptance ratio")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "0.2", "0.4", "0.6", "0.8", "1"])
    axes.grid(color="#dddddd")


def draw_prompts(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Each prompt's acceptance length against its decode speed-up, one panel a data set."""
    if not run.prompts:
        raise NothingToDraw(
            "No prompt was answered by both the baseline and a drafting technique at batch size 1."
        )
    datasets = [name for name in run.datasets if any(result.dataset == name for result in run.prompts)]
    names = list(dict.fromkeys(result.model_type for result in run.prompts))
    panels = figure.subplots(1, len(datasets), squeeze=False, sharex=True, sharey=True)[0]
    for dataset, axes in zip(datasets, panels, strict=True):
        for name, marker in zip(names, cycle(MARKERS), strict=False):
            own = [result for result in run.prompts if (result.dataset, result.model_type) == (dataset, name)]
            lengths, ratios = [r.acceptance_length for r in own], [r.decode_speedup for r in own]
            axes.scatter(
                lengths, ratios, s=34, marker=marker, color=colours[name], edgecolor="white", label=name
            )
        axes.axhline(1.0, color="#111111", linewidth=1)
        axes.set_title(dataset_label(dataset), loc="left")
        axes.set_xlabel("acceptance length,\ntokens / decode step")
        axes.grid(color="#dddddd")
    panels[0].set_ylabel(f"decode speed-up over {run.baseline}")
    panels[0].set_xlim(left=0.9)
    panels[0].set_ylim(bottom=0)
    add_legend(figure, panels)
    return (1,)
