"""Turns a saved run into tables, and keeps the README's marked regions equal to them.

A table is a list of rows of text, the first its header; markdown for the README, HTML in `report_page.py`. The terminal's
table is `benchmark/table.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.describe import dataset_label, failures, remarks, setting_label, workload_label
from benchmark.saved_run import ResultsError, SavedRun, is_measured
from benchmark.table import draft_tree, quality

Table = list[list[str]]
MIB = 2**20
UNSURE = "\\*"
UNSURE_NOTE = f"{UNSURE} the 95 % interval holds 1: not distinguishable from the baseline."
DETAIL_COLUMNS = (
    "data set", "technique", "batch", "tokens/s", "speed-up [95 %]", "decode tokens/s", "decode speed-up [95 %]",
    "draft nodes", "acceptance length", "same text", "gap", "same as own model", "TTFT ms", "TPOT ms", "weights MiB",
    "peak MiB", "quality",
)  # fmt: skip


def headline_table(run: SavedRun, batch_size: int) -> Table:
    """Returns one row per technique: tokens/s and speed-up on each data set."""
    table = [["technique", *(dataset_label(name) for name in run.datasets)]]
    for name in run.techniques:
        cells = [_speed_cell(run.row(name, dataset, batch_size)) for dataset in run.datasets]
        if any(cells):
            table.append([name, *cells])
    return table


def detail_table(run: SavedRun) -> Table:
    """Returns one row per cell with every measured quantity."""
    order = {name: place for place, name in enumerate(run.datasets)}
    rows = sorted(run.rows, key=lambda row: (order[str(row["dataset"])], row["batch_size"]))
    return [list(DETAIL_COLUMNS), *(_detail_row(row) for row in rows)]


def markdown(table: Table) -> str:
    """Returns a table as GitHub markdown: first column left, the others right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def run_section(run: SavedRun) -> str:
    """Returns a run's README section: what it was measured on, the headline, and every quantity folded away."""
    parts = [
        f"**{setting_label(run)}**",
        f"{workload_label(run)}. Tokens/s with prefill (ratio to `{run.baseline}`):",
    ]
    if not run.ok_rows():
        parts[1:] = ["No cell of this run was measured."]
    for size in run.batch_sizes if run.ok_rows() else ():
        headline = headline_table(run, size)
        parts += [f"Batch {size}:"] if len(run.batch_sizes) > 1 else []
        parts.append(markdown(headline))
        parts += [UNSURE_NOTE] if any(UNSURE in cell for row in headline for cell in row) else []
    for title, sentences in (("Not measured", failures(run)), ("Remarks", remarks(run))):
        parts += [f"{title}: {'; '.join(sentences)}."] if sentences else []
    detail = markdown(detail_table(run))
    parts.append(
        f"<details><summary>All quantities of <code>{run.name}</code></summary>\n\n{detail}\n\n</details>"
    )
    return "\n\n".join(parts)


def update_readme(path: Path, runs: Sequence[SavedRun], figure: Path | None) -> str:
    """Returns the README's text with its marked regions filled: `results` with tables, `figure` with one image.

    Raises:
        ResultsError: the file is missing, or has no pair of `results` marks.
    """
    if not path.is_file():
        raise ResultsError(f"no README at {path}: give the file that holds the <!-- results:begin --> mark")
    text = path.read_text(encoding="utf-8")
    text = replace_region(text, "results", "\n\n".join(run_section(run) for run in runs), path)
    if figure is not None and "<!-- figure:begin -->" in text:
        where = _relative(figure, path.parent)
        text = replace_region(
            text, "figure", f"![Output tokens per second, {setting_label(runs[0])}]({where})", path
        )
    return text


def replace_region(text: str, name: str, content: str, path: Path) -> str:
    """Returns the text with what stands between `<!-- name:begin -->` and `<!-- name:end -->` replaced.

    Raises:
        ResultsError: the two marks are not there once each, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultsError(
            f"{path} must hold {begin} and {end} once each, in this order: add them where tables go"
        )
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def number(value: Any, unit: float = 1.0) -> str:
    """Returns a number with three figures, or an empty cell for what was not measured."""
    if value is None:
        return ""
    scaled = float(value) * unit
    digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
    return f"{scaled:.{digits}f}"


def holds_one(interval: Any) -> bool:
    """Returns whether an interval of a ratio says 'no difference shown'; the baseline's own [1, 1] does not count."""
    if not interval or None in interval:
        return False
    return bool(interval[0] <= 1.0 <= interval[1] and interval[0] < interval[1])


def _speed_cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if not is_measured(row):
        return str(row["status"])
    ratio = row.get("speedup")
    unsure = UNSURE if holds_one(row.get("speedup_ci95")) else ""
    return number(row["tokens_per_s"]) + (f" ({ratio:.2f}x{unsure})" if ratio else "")


def _detail_row(row: Mapping[str, Any]) -> list[str]:
    place = [dataset_label(str(row["dataset"])), str(row["model_type"]), str(row["batch_size"])]
    if not is_measured(row):
        return place + [str(row["status"])] + [""] * (len(DETAIL_COLUMNS) - len(place) - 1)
    return place + [
        number(row["tokens_per_s"]),
        _ratio(row, "speedup"),
        number(row.get("decode_tokens_per_s")),
        _ratio(row, "decode_speedup"),
        draft_tree(row),
        number(row.get("acceptance_length")),
        _share(row.get("match_rate")),
        "" if row.get("divergence_gap_max") is None else f"{row['divergence_gap_max']:.2g}",
        _share(row.get("exact_rate")),
        number(row.get("ttft_s"), 1e3),
        number(row.get("tpot_s"), 1e3),
        number(row.get("weight_bytes"), 1 / MIB),
        number(row.get("peak_memory_bytes"), 1 / MIB),
        quality(row),
    ]


def _ratio(row: Mapping[str, Any], field: str) -> str:
    ratio, interval = row.get(field), row.get(f"{field}_ci95")
    if ratio is None:
        return ""
    if not interval or None in interval or interval[0] == interval[1]:
        return f"{ratio:.2f}"
    return f"{ratio:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _share(value: Any) -> str:
    return "" if value is None else f"{100 * float(value):.3g} %"


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
