"""The figure of decode speed against weight memory, perplexity as colour: what packed weights cost and what they save.

A technique is one mark. The colour stops at `MOST_TIMES` the best perplexity of a panel, so that a collapsed model does not make
all others look alike; what lies beyond has the last colour, and the colour bar an arrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmark.config import REFERENCES, WIKITEXT2
from benchmark.describe import dataset_label
from benchmark.figure_parts import WIDTH_INCHES
from benchmark.saved_run import SavedRun, is_measured
from benchmark.table import PREFIX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GB = 1e9
MOST_TIMES = 2.0
LABEL_HEIGHT, LABEL_WIDTH = 0.065, 0.3
"""Of a label, as shares of the axes: closer ones are moved apart."""
AXES_MARGIN = 1.18
COLOURS = "viridis_r"

Row = Mapping[str, Any]


def holds_memory(run: SavedRun) -> bool:
    """Returns whether two techniques or more of a run have weight memory, decode speed and perplexity."""
    return bool(_panels(run))


def draw_memory(run: SavedRun, figure: Figure, colours: Mapping[str, str]) -> tuple[int, ...]:
    """Decode tokens/s against GB of weights, a mark a technique, one panel a data set, smallest batch size.

    Colour is the perplexity of a panel's own references, else of WikiText-2; techniques without one are hollow.
    """
    del colours  # the colour is the perplexity; labels name the techniques
    panels = _panels(run)
    figure.set_size_inches(WIDTH_INCHES, 1.2 + 3.4 * len(panels))
    for (dataset, rows), axes in zip(
        panels.items(), figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True
    ):
        _panel(figure, axes, rows)
        axes.set_title(dataset_label(dataset), loc="left")
    return (int(next(iter(panels.values()))[0]["batch_size"]),)


def _panels(run: SavedRun) -> dict[str, list[Row]]:
    """Returns by data set the rows to draw, a technique each; only where two or more have all three numbers."""
    size = min((int(row["batch_size"]) for row in run.ok_rows()), default=0)
    found = {}
    for dataset in run.datasets:
        rows = [row for name in run.techniques if _has_place(row := run.row(name, dataset, size))]
        if _column(rows) is not None:
            found[dataset] = [row for row in rows if row is not None]
    return found


def _has_place(row: Row | None) -> bool:
    return (
        row is not None
        and is_measured(row)
        and bool(row.get("weight_bytes") and row.get("decode_tokens_per_s"))
    )


def _column(rows: Sequence[Row | None]) -> str | None:
    """Returns the perplexity that colours a panel: the first of which two rows or more have a number."""
    for name in (PREFIX + REFERENCES, PREFIX + WIKITEXT2):
        if sum(_perplexity(row, name) is not None for row in rows) > 1:
            return name
    return None


def _perplexity(row: Row | None, name: str) -> float | None:
    value = ((row or {}).get("quality") or {}).get(name)
    return None if value is None else float(value)


def _panel(figure: Figure, axes: Axes, rows: Sequence[Row]) -> None:
    column = str(_column(rows))
    places = [(row["weight_bytes"] / GB, float(row["decode_tokens_per_s"])) for row in rows]
    values = [_perplexity(row, column) for row in rows]
    known = [(place, value) for place, value in zip(places, values, strict=True) if value is not None]
    hollow = [place for place, value in zip(places, values, strict=True) if value is None]
    best, worst = min(value for _, value in known), max(value for _, value in known)
    limit = MOST_TIMES * best
    marks = axes.scatter(
        [x for (x, _), _ in known],
        [y for (_, y), _ in known],
        c=[value for _, value in known],
        cmap=COLOURS,
        vmin=best,
        vmax=min(worst, limit) if worst > best else best * 1.01,
        s=90,
        edgecolor="black",
        zorder=3,
    )
    extend = "max" if worst > limit else "neither"
    figure.colorbar(marks, ax=axes, extend=extend, label=column.replace("_", ",\n"))
    if hollow:
        axes.scatter(
            [x for x, _ in hollow],
            [y for _, y in hollow],
            s=90,
            facecolor="none",
            edgecolor="#888888",
            zorder=3,
        )
    axes.set_xlim(0, AXES_MARGIN * max(x for x, _ in places))
    axes.set_ylim(0, AXES_MARGIN * max(y for _, y in places))
    axes.set_xlabel("GB of weights")
    axes.set_ylabel("decode tokens / s")
    axes.grid(color="#dddddd")
    _label(axes, [str(row["model_type"]) for row in rows], places)


def _label(axes: Axes, names: Sequence[str], places: Sequence[tuple[float, float]]) -> None:
    """Writes each name beside its mark, on the side with more room, and moves names that would overlap apart."""
    width, height = axes.get_xlim()[1], axes.get_ylim()[1]
    taken: list[tuple[float, float]] = []
    for name, (x, y) in sorted(zip(names, places, strict=True), key=lambda one: one[1][1]):
        right = x < width / 2
        level = y
        for other_x, other_level in taken:
            if abs(other_x - x) < LABEL_WIDTH * width and level - other_level < LABEL_HEIGHT * height:
                level = other_level + LABEL_HEIGHT * height
        taken.append((x, level))
        axes.annotate(
            name,
            (x, y),
            xytext=(x + (0.013 if right else -0.013) * width, level),
            ha="left" if right else "right",
            va="center",
            fontsize=10,
        )
