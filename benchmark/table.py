"""The table printed at the end: coloured on a terminal, plain text without control characters everywhere else."""

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from benchmark.records import OK

Row = Mapping[str, Any]
PREFIX = "perplexity_"  # metrics whose names begin with it belong to the weights, not to the answers


def _number(key: str, form: str, scale: int = 1) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else format(row[key] * scale, form)


def _ratio(key: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        if row.get(key) is None:
            return ""
        interval = row.get(f"{key}_ci95")
        if not interval:
            return f"{row[key]:.2f}x"
        unclear = "*" if interval[0] < 1 < interval[1] else ""
        return f"{row[key]:.2f}x{unclear} [{interval[0]:.2f}, {interval[1]:.2f}]"

    return show


def quality(row: Row) -> str:
    """Returns a row's metrics: counts as they are, perplexities with five figures, all else with three."""
    return ", ".join(f"{name} {_score(name, value)}" for name, value in (row.get("quality") or {}).items())


def _score(name: str, value: float | int) -> str:
    if isinstance(value, int):
        return str(value)
    return format(value, ".5g" if name.startswith(PREFIX) else ".3g")


def draft_tree(row: Row) -> str:
    """Returns the number of nodes of a row's draft tree and who decided it; empty where nothing was drafted."""
    return ", ".join(str(row[key]) for key in ("draft_nodes", "draft_source") if row.get(key))


COLUMNS: dict[str, Callable[[Row], str]] = {
    "data set": lambda row: str(row["dataset"]),
    "batch": lambda row: str(row["batch_size"]),
    "technique": lambda row: str(row["model_type"]),
    "dtype": lambda row: str(row.get("dtype") or ""),
    "tokens/s": _number("tokens_per_s", ".1f"),
    "decode tokens/s": _number("decode_tokens_per_s", ".1f"),
    "speed-up": _ratio("speedup"),
    "decode speed-up": _ratio("decode_speedup"),
    "TTFT ms": _number("ttft_s", ".1f", 1000),
    "nodes": draft_tree,
    "acceptance": _number("acceptance_length", ".2f"),
    "match": _number("match_rate", ".3f"),
    "quality": quality,
}
LEFT = ("data set", "technique", "dtype", "quality")
FOOTER = (
    "tokens/s: output tokens / (prefill + decode seconds); decode tokens/s: after the first token; "
    "speed-up: over {baseline}, 95 % paired bootstrap over prompts, * where no difference is shown; "
    "nodes: size of the draft tree, and whether it was tuned for this device, given or the default; "
    "acceptance: tokens per decode step, bonus token included; "
    "match: answers equal to {baseline}'s, token for token."
)
PERPLEXITY_FOOTER = (
    "perplexity: exp of the mean negative log-likelihood of a token, natural logarithm; of one tokenizer's tokens, so that only "
    "models with the same tokenizer compare."
)


def print_table(rows: Iterable[Row], title: str, stream: TextIO | None = None) -> None:
    """Prints the rows of a summary, why a row has no numbers, and where prompts were cut."""
    stream = sys.stdout if stream is None else stream
    rows = list(rows)
    cells = [[show(row) for show in COLUMNS.values()] for row in rows]
    used = [index for index in range(len(COLUMNS)) if any(line[index] for line in cells)]
    heads = [list(COLUMNS)[index] for index in used]
    body = [[line[index] for index in used] for line in cells]
    if not (is_terminal(stream) and _print_rich(heads, body, title, stream)):
        stream.write(_plain(heads, body, title))
    for row in rows:
        if row["status"] != OK:
            place = f"{row['model_type']} on {row['dataset']}, batch {row['batch_size']}"
            stream.write(f"{place}: {row['status']}, {row.get('reason')}\n")
    for remark in cut_prompts(rows):
        stream.write(remark + "\n")
    if rows:
        stream.write(FOOTER.format(baseline=rows[0]["model_type"]) + "\n")
    if any(name.startswith(PREFIX) for row in rows for name in row.get("quality") or ()):
        stream.write(PERPLEXITY_FOOTER + "\n")


def cut_prompts(rows: Iterable[Row]) -> list[str]:
    """Returns a remark for each data set of which prompts were cut; it counts those of the row with the most."""
    most: dict[str, Row] = {}
    for row in rows:
        cut = row.get("prompts_truncated") or 0
        if cut > (most.get(row["dataset"], {}).get("prompts_truncated") or 0):
            most[row["dataset"]] = row
    return [
        f"{name}: {row['prompts_truncated']} of {row['prompts']} prompts lost their beginning, to leave room for "
        "--max_new_tokens within the model's positions"
        for name, row in most.items()
    ]


def is_terminal(stream: TextIO) -> bool:
    """Returns whether colours and control characters are welcome."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print_rich(heads: list[str], body: list[list[str]], title: str, stream: TextIO) -> bool:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    table = Table(title=escape(title), title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head in LEFT else "right", overflow="fold")
    for line in body:
        table.add_row(*map(escape, line))
    Console(file=stream).print(table)
    return True


def _plain(heads: list[str], body: list[list[str]], title: str) -> str:
    widths = [max(len(line[place]) for line in [heads, *body]) for place in range(len(heads))]
    lines = [title]
    for line in [heads, ["-" * width for width in widths], *body]:
        parts = [
            text.ljust(width) if head in LEFT else text.rjust(width)
            for text, width, head in zip(line, widths, heads, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines) + "\n"
