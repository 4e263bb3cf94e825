"""Draws a saved run's figures: speed, step time, acceptance. Reads JSON through `SavedRun` and nothing else.

A figure whose numbers are missing is drawn all the same, with the reason in its place: an empty slot in a report never
has to be guessed at. One mapping gives each technique its colour in every figure; the colours are told apart under the
common forms of colour blindness, and lines and bars are labelled besides.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmark.describe import dataset_label, setting_label
from benchmark.report_tables import number
from benchmark.saved_run import SavedRun, is_measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TECHNIQUE_COLOURS = {
    "naive": "#4d4d4d",
    "half": "#56b4e9",
    "flash": "#0072b2",
    "no_cache": "#b8b8b8",
    "kv_cache": "#ddaa33",
    "static": "#009e73",
    "prompt_lookup": "#aa4499",
    "spec_stream": "#d55e00",
}
OTHER_COLOURS = ("#332288", "#999933", "#882255", "#44aa99", "#661100", "#6699cc", "#cc79a7", "#117733")
PHASE_COLOURS = {
    "prefill": "#c7c7c7",
    "draft": "#f0c75e",
    "forward": "#4477aa",
    "verify": "#66ccbb",
    "commit": "#aa3377",
    "host": "#333333",
}
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
MARKERS = "os^Dvp"
WIDTH_INCHES = 10.0
SETTING_CHARACTERS = 100
REASON_CHARACTERS = 80
LONGEST_BAR = 3.0  # in medians; what is longer is cut and says so, or no_cache would flatten the rest


class FiguresUnavailable(RuntimeError):
    """matplotlib is not installed; the message says how to install it."""


class NothingToDraw(Exception):
    """A figure's numbers are missing; the message is drawn in their place."""


@dataclass(frozen=True)
class Drawn:
    """A figure on disk. `missing` says why it is empty, and is None when it is not."""

    name: str
    path: Path
    caption: str
    missing: str | None


def technique_colours(names: Iterable[str]) -> dict[str, str]:
    """Returns the colour of each technique: the fixed one, or for a name without one, the next of a second list."""
    others = sorted(set(names) - TECHNIQUE_COLOURS.keys())
    return TECHNIQUE_COLOURS | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}


def draw_figures(run: SavedRun, folder: Path, colours: Mapping[str, str] | None = None) -> list[Drawn]:
    """Writes every figure of a run as PNG into a folder and returns what was written.

    Raises:
        FiguresUnavailable: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FiguresUnavailable("figures need matplotlib: pip install matplotlib") from error
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with rc_context(STYLE):
        for name, kind in FIGURES.items():
            figure = Figure(figsize=(WIDTH_INCHES, 4.6))
            missing = _draw_or_say_why(kind, run, figure, colours or technique_colours(run.techniques))
            path = folder / f"{name}.png"
            figure.savefig(path, metadata={"Software": None})
            drawn.append(Drawn(name, path, kind.caption, missing))
    return drawn


def _draw_or_say_why(
    kind: FigureKind, run: SavedRun, figure: Figure, colours: Mapping[str, str]
) -> str | None:
    missing, sizes = None, run.batch_sizes
    try:
        sizes = kind.draw(run, figure, colours)
    except NothingToDraw as reason:
        missing = str(reason)
        figure.clear()
        figure.set_size_inches(WIDTH_INCHES, 2.2)
        words = textwrap.fill(missing, REASON_CHARACTERS, break_on_hyphens=False)
        figure.text(0.5, 0.35, words, ha="center", va="center", color="#555555")
    setting = textwrap.fill(setting_label(run, sizes), SETTING_CHARACTERS, break_on_hyphens=False)
    figure.suptitle(f"{kind.title}\n{setting}", x=0.01, ha="left", fontsize=12)
    return missing


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
    _legend(figure, panels)
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
    axes.set_ylabel("tokens / s, prefill included")
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


def speed_interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the 95 % interval of tokens/s: its own if saved, else the speed-up's, scaled to this row's speed."""
    own = row.get("tokens_per_s_ci95")
    if own:
        return float(own[0]), float(own[1])
    ratio, speed, interval = row.get("speedup"), row.get("tokens_per_s"), row.get("speedup_ci95")
    if not (ratio and speed and interval) or None in interval:
        return None
    return speed * interval[0] / ratio, speed * interval[1] / ratio


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
    _legend(figure, panels, per_line=6)
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


def draw_acceptance_sweep(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Tokens/s against the acceptance ratio, the other techniques as horizontal lines, one panel a data set."""
    points = [point for point in run.sweep if point.get("tokens_per_s")]
    if not points:
        raise NothingToDraw(
            "No acceptance sweep in this run: ask for one with --acceptance_sweep 0,0.2,0.4,0.6,0.8,1."
        )
    size = min(int(point.get("batch_size", 1)) for point in points)
    points = [point for point in points if point.get("batch_size", 1) == size]
    datasets = list(dict.fromkeys(str(point["dataset"]) for point in points))
    figure.set_size_inches(WIDTH_INCHES, 5.2)
    panels = figure.subplots(1, len(datasets), squeeze=False, sharey=True)[0]
    for dataset, axes in zip(datasets, panels, strict=True):
        _sweep_panel(run, axes, [point for point in points if point["dataset"] == dataset], size, colours)
        axes.set_title(dataset_label(dataset), loc="left")
    panels[0].set_ylabel("tokens / s, prefill included")
    panels[0].set_ylim(bottom=0)
    _legend(figure, panels)
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
    _legend(figure, panels)
    return (1,)


def _legend(figure: Figure, panels: Iterable[Axes], per_line: int = 5) -> None:
    """Puts one legend under all panels, each label once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {
            label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries
        }
    columns = min(len(entries), per_line)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure. `draw` fills it and returns the batch sizes shown, or raises `NothingToDraw`."""

    draw: Callable[[SavedRun, Figure, Mapping[str, str]], tuple[int, ...]]
    title: str
    caption: str


FIGURES = {
    "tokens_per_s": FigureKind(
        draw_tokens_per_s,
        "Output tokens per second",
        "Output tokens per second by data set and technique, prefill included. Whiskers: 95 % interval, "
        "bootstrap over prompts.",
    ),
    "step_time": FigureKind(
        draw_breakdown,
        "Where a token's time goes",
        "Milliseconds per output token by phase, from an instrumented run of its own: its sum is not the headline.",
    ),
    "acceptance_sweep": FigureKind(
        draw_acceptance_sweep,
        "Speed at a given acceptance ratio",
        "Tokens per second when the draft tree holds the right token with the given probability at each depth, at real "
        "cost. Dashed: the other techniques. Dotted: the trained streams.",
    ),
    "prompts": FigureKind(
        draw_prompts,
        "Every prompt: acceptance length and speed-up",
        "One mark per prompt: acceptance length, bonus token included, against decode speed over the baseline's.",
    ),
}
