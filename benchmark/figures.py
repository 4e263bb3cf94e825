"""Draws a saved run's figures: speed, step time, throughput, acceptance, memory. Reads JSON through `SavedRun` and nothing else.

A figure whose numbers are missing is drawn all the same, with the reason in its place: an empty slot in a report never
has to be guessed at. A figure of what the run was never asked for (a sweep, several batch sizes, perplexity) is left out. One
mapping gives each technique its colour in every figure; the colours are told apart under the common forms of colour
blindness, and lines and bars are labelled besides.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.bar_figures import draw_breakdown, draw_tokens_per_s
from benchmark.describe import setting_label
from benchmark.figure_parts import WIDTH_INCHES, NothingToDraw
from benchmark.line_figures import draw_acceptance_sweep, draw_prompts, draw_throughput
from benchmark.memory_figure import draw_memory, holds_memory
from benchmark.saved_run import SavedRun

if TYPE_CHECKING:
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
SETTING_CHARACTERS = 100
REASON_CHARACTERS = 80


class FiguresUnavailable(RuntimeError):
    """matplotlib is not installed; the message says how to install it."""


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
    """Writes the figures that apply to a run as PNG into a folder and returns what was written.

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
            path = folder / f"{name}.png"
            if not kind.applies(run):
                path.unlink(missing_ok=True)  # of an earlier run of this name, overwritten since
                continue
            figure = Figure(figsize=(WIDTH_INCHES, 4.6))
            missing = _draw_or_say_why(kind, run, figure, colours or technique_colours(run.techniques))
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


@dataclass(frozen=True)
class FigureKind:
    """One kind of figure.

    Args:
        draw: fills it and returns the batch sizes shown, or raises `NothingToDraw`.
        title: its first line.
        caption: what it shows, in words.
        applies: whether a run was asked for what it shows.
    """

    draw: Callable[[SavedRun, Figure, Mapping[str, str]], tuple[int, ...]]
    title: str
    caption: str
    applies: Callable[[SavedRun], bool] = lambda _run: True


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
    "throughput": FigureKind(
        draw_throughput,
        "Output tokens per second by batch size",
        "Output tokens per second of the whole batch over the number of prompts answered at once, prefill included. "
        "Whiskers: 95 % interval, bootstrap over prompts.",
        applies=lambda run: len(run.batch_sizes) > 1,
    ),
    "acceptance_sweep": FigureKind(
        draw_acceptance_sweep,
        "Speed at a given acceptance ratio",
        "Tokens per second when the draft tree holds the right token with the given probability at each depth, at real "
        "cost. Dashed: the other techniques. Dotted: the trained streams.",
        applies=lambda run: bool(run.sweep),
    ),
    "prompts": FigureKind(
        draw_prompts,
        "Every prompt: acceptance length and speed-up",
        "One mark per prompt: acceptance length, bonus token included, against decode speed over the baseline's.",
    ),
    "memory": FigureKind(
        draw_memory,
        "Decode speed, weight memory and perplexity",
        "Decode tokens per second against the bytes of the weights; the colour is the perplexity, lower is better. Hollow: "
        "its perplexity was not measured.",
        applies=holds_memory,
    ),
}
