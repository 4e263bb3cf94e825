"""Figures of bars: speed by data set and technique, and where a token's time goes."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmark.describe import dataset_label
from benchmark.figure_parts import SPEED_AXIS, WIDTH_INCHES, NothingToDraw, add_legend, speed_interval
from benchmark.report_tables import number
from benchmark.saved_run import SavedRun, is_measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLOURS = {
    "prefill": "#c7c7c7",
    "draft": "#f0c75e",
    "forward": "#4477aa",
    "verify": "#66ccbb",
    "commit": "#aa3377",
    "host": "#333333",
}
LONGEST_BAR = 3.0  # in medians; what is longer is cut and says so, or no_cache would flatten the rest


def draw_tokens_per_s(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Bars of tokens/s by data set and technique with 95 % intervals, one panel a batch size."""
    sizes = tuple(size for size in run.batch_sizes if any(row["batch_size"] == size for row in run.ok_rows()))
    if not sizes:
        raise NothingToDraw("No cell of this run was measured, so there is no speed to draw.")
    figure.set_size_inches(WIDTH_INCHES, 1.6 + 3.4 * len(sizes))
    panels = figure.subplots(len(sizes), 1, squeeze=False)[:, 0]
    for size, axes in zip(sizes, panels, strict=True):
        _speed_panel(run, axes, size, colours)
        if len(sizes) > 1:
            axes.set_title(f"batch {size}", loc="left")
    add_legend(figure, panels)
    return sizes


def _speed_panel(run: SavedRun, axes: Axes, batch_size: int, colours: Mapping[str, str]) -> None:
    shown = [
        name
        for name in run.techniques
        if any(is_measured(run.row(name, d, batch_size)) for d in run.datasets)
    ]
    width = 0.84 / len(shown)
    for place, name in enumerate(shown):
        offset = (place - (len(shown) - 1) / 2) * width
        label: str | None = name
        for index, dataset in enumerate(run.datasets):
            row = run.row(name, dataset, batch_size)
            if row is None or not is_measured(row):
                status = "" if row is None else str(row["status"])
                axes.annotate(status, (index + offset, 0), rotation=90, ha="center", va="bottom", fontsize=10)
                continue
            _speed_bar(axes, index + offset, row, width, colours[name], label)
            label = None
    axes.set_xticks(range(len(run.datasets)), [dataset_label(name) for name in run.datasets])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(SPEED_AXIS)
    axes.grid(axis="y", color="#dddddd")
    axes.margins(y=0.1)


def _speed_bar(
    axes: Axes, x: float, row: Mapping[str, Any], width: float, colour: str, label: str | None
) -> None:
    speed = float(row["tokens_per_s"])
    low, high = speed_interval(row) or (speed, speed)
    axes.bar(x, speed, width=width * 0.92, color=colour, label=label)
    if high > low:
        bounds = [[max(speed - low, 0.0)], [max(high - speed, 0.0)]]
        axes.errorbar(x, speed, yerr=bounds, color="#111111", capsize=2.5, linewidth=1)
    text = f"{speed:.0f}" if speed >= 10 else number(speed)
    axes.annotate(
        text,
        (x, max(speed, high)),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=9,
    )


def draw_breakdown(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Stacked bars of milliseconds per output token by phase, one panel a data set, smallest batch size."""
    del colours  # phases have their own
    timed = [row for row in run.ok_rows() if row.get("breakdown_s") and row.get("output_tokens")]
    if not timed:
        raise NothingToDraw(
            "No step-time breakdown was saved: it comes from a run of its own beside the headline."
        )
    size = min(int(row["batch_size"]) for row in timed)
    timed = [row for row in timed if row["batch_size"] == size]
    datasets = [name for name in run.datasets if any(row["dataset"] == name for row in timed)]
    names = [name for name in run.techniques if any(row["model_type"] == name for row in timed)]
    figure.set_size_inches(WIDTH_INCHES, 1.9 + 0.38 * max(len(names), 3))
    panels = figure.subplots(1, len(datasets), squeeze=False, sharex=True, sharey=True)[0]
    totals = [sum(_ms_per_token(row, phase) for phase in row["breakdown_s"]) for row in timed]
    limit = min(1.3 * max(totals), LONGEST_BAR * median(totals))
    for dataset, axes in zip(datasets, panels, strict=True):
        _breakdown_panel(axes, [row for row in timed if row["dataset"] == dataset], names, limit)
        axes.set_title(dataset_label(dataset), loc="left")
    panels[0].invert_yaxis()
    add_legend(figure, panels, per_line=6)
    return (size,)


def _breakdown_panel(axes: Axes, rows: list[Mapping[str, Any]], names: list[str], limit: float) -> None:
    by_name = {row["model_type"]: row for row in reversed(rows)}
    left = [0.0] * len(names)
    for phase in _phases(rows):
        values = [_ms_per_token(by_name.get(name), phase) for name in names]
        axes.barh(
            names, values, left=left, color=PHASE_COLOURS.get(phase, "#888888"), label=phase, height=0.72
        )
        left = [total + value for total, value in zip(left, values, strict=True)]
    for place, total in enumerate(left):
        cut = total > limit
        words = f"{number(total)}, cut " if cut else f" {number(total)}" if total else " not measured"
        axes.annotate(
            words,
            (limit if cut else total, place),
            ha="right" if cut else "left",
            va="center",
            fontsize=9,
            color="white" if cut else "black",
        )
    axes.set_xlim(0, limit)
    axes.set_xlabel("ms / output token")
    axes.grid(axis="x", color="#dddddd")
    axes.tick_params(axis="y", length=0)


def _phases(rows: list[Mapping[str, Any]]) -> list[str]:
    seen = {phase for row in rows for phase, seconds in row["breakdown_s"].items() if seconds}
    return [phase for phase in PHASE_COLOURS if phase in seen] + sorted(seen - PHASE_COLOURS.keys())


def _ms_per_token(row: Mapping[str, Any] | None, phase: str) -> float:
    return 0.0 if row is None else 1e3 * (row["breakdown_s"].get(phase) or 0.0) / row["output_tokens"]
