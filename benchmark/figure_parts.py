"""What figures share: a speed's interval, the legend, the size of the page, and the word that there is nothing to draw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 10.0
SPEED_AXIS = "tokens / s, prefill included"


class NothingToDraw(Exception):
    """A figure's numbers are missing; the message is drawn in their place."""


def speed_interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the 95 % interval of tokens/s: its own if saved, else the speed-up's, scaled to this row's speed."""
    own = row.get("tokens_per_s_ci95")
    if own:
        return float(own[0]), float(own[1])
    ratio, speed, interval = row.get("speedup"), row.get("tokens_per_s"), row.get("speedup_ci95")
    if not (ratio and speed and interval) or None in interval:
        return None
    return speed * interval[0] / ratio, speed * interval[1] / ratio


def add_legend(figure: Figure, panels: Iterable[Axes], per_line: int = 5) -> None:
    """Puts one legend under all panels, each label once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= {
            label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries
        }
    columns = min(len(entries), per_line)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)
