"""A study in words and tables: `report.md` and `sensitivity.csv`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import expm1
from pathlib import Path
from typing import Any

from benchmark.files import write_atomically, write_csv, write_json
from models.precision_plan import PLAIN
from precision.study import Findings
from precision.units import ALL

WORST = 12
COLUMNS = (
    "unit", "layer", "part", "weights", "weight_mse", "weight_relative_mse", "output_cosine", "nll_change",
    "nll_change_error", "perplexity_ratio", "int8_nll_change", "bytes",
)  # fmt: skip


def write_tables(findings: Findings, folder: Path) -> None:
    """Writes `sensitivity.csv`, `plan.json` and `report.md` into a study's folder."""
    write_csv(folder / "sensitivity.csv", [{name: row[name] for name in COLUMNS} for row in findings.rows])
    write_json(folder / "plan.json", findings.plan)
    write_atomically(folder / "report.md", page(findings, folder))


def page(findings: Findings, folder: Path) -> str:
    """Returns the report as Markdown; figures are those that lie in the folder."""
    about = findings.about
    figures = [name for name in ("sensitivity", "plans") if (folder / "figures" / f"{name}.png").exists()]
    parts = [
        f"# Sensitivity of {about['model']} to {about['format']}",
        _setting(about),
        *(f"![{name}](figures/{name}.png)" for name in figures[:1]),
        f"## The {min(WORST, len(findings.rows))} that hurt most",
        _worst(findings.rows),
        *_sums(findings.rows),
        "## Plans",
        _plans(findings),
        *(f"![{name}](figures/{name}.png)" for name in figures[1:]),
        "## How to read this",
        _notes(about),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(about: Mapping[str, Any]) -> str:
    return (
        f"{about['linear_layers']} linear layers with {about['weights']:,} weights, quantised one {about['by']} at a time; "
        f"{about['dtype']} on {about['device']}. Text: {about['text']}, {about['study_tokens']:,} judged tokens in "
        f"{about['study_samples']} samples; perplexity as it is {about['study_perplexity']:.3f}. Plans are judged by "
        f"{about['judge_tokens']:,} other tokens of that text."
    )


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    chosen = sorted(rows, key=lambda row: -row["nll_change"])[:WORST]
    heads = ("unit", "perplexity", "± s.e.", "in INT8", "weight MSE", "relative", "output cosine")
    return table(
        heads,
        (
            (
                f"`{row['unit']}`",
                percent(row["nll_change"]),
                _error(row),
                "" if row["int8_nll_change"] is None else percent(row["int8_nll_change"]),
                f"{row['weight_mse']:.2e}",
                f"{row['weight_relative_mse']:.2e}",
                "" if row["output_cosine"] is None else f"{row['output_cosine']:.5f}",
            )
            for row in chosen
        ),
    )


def _error(row: Mapping[str, Any]) -> str:
    error = row["nll_change_error"]
    return "" if error is None else f"{100 * error:.2f} %"


def _sums(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a table a layer and one a kind of projection, where rows tell both apart."""
    if any(ALL in (row["layer"], row["part"]) for row in rows):
        return []
    return [
        "## Summed over projections, and over layers",
        _sum_table("layer", rows, lambda row: row["layer"]),
        _sum_table("projection", rows, lambda row: f"`{row['part']}`"),
    ]


def _sum_table(head: str, rows: Sequence[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], str]) -> str:
    sums: dict[str, float] = {}
    for row in rows:
        sums[key(row)] = sums.get(key(row), 0.0) + row["nll_change"]
    return table((head, "perplexity, summed"), ((name, percent(value)) for name, value in sums.items()))


def _plans(findings: Findings) -> str:
    lines = table(
        ("stored as", "MB", "times", "INT8 layers", "plain layers", "perplexity", "change", "± s.e."),
        (
            (
                ", ".join(point["names"]),
                f"{point['bytes'] / 1e6:.2f}",
                f"{point['times']:.2f}",
                point["int8_layers"],
                point["plain_layers"],
                f"{point['perplexity']:.3f}",
                percent(point["nll_change"]),
                _error(point),
            )
            for point in findings.points
        ),
    )
    return f"{lines}\n\n{_plan_in_words(findings.plan)}"


def _plan_in_words(plan: Mapping[str, Any]) -> str:
    plain = sum(value == PLAIN for value in plan["modules"].values())
    return (
        f"`plan.json` is the plan of budget {plan['budget']:g}: {len(plan['modules']) - plain} layers in INT8, {plain} in half "
        f"precision, the others in the default format. Measured alone, its damages add up to "
        f"{percent(plan['expected_nll_change'])}. Use it with "
        "`python dataset_tps.py --model_type naive,int4 --precision_plan plan.json`."
    )


def _notes(about: Mapping[str, Any]) -> str:
    half = (
        f" Plain weights count two bytes here, as in half precision, while this study computes in {about['dtype']}."
        if about["dtype"] == "float32"
        else ""
    )
    return (
        "- perplexity: exp of the change of the mean negative log-likelihood a token against the model as it is, on the same "
        "tokens. Its standard error is over samples; what is within two of it is not told from nothing.\n"
        "- Less perplexity than the model as it is: coarser weights flatten its predictions, which helps on text that it does "
        "not know. Then this text says little; give one of the kind that the model is for, such as `--text references`.\n"
        "- weight MSE: of the weights read back; relative: divided by their mean square.\n"
        "- output cosine: between the layer's outputs and those of its own weights on the same inputs, mean over tokens.\n"
        "- MB: the linear layers' stored weights, scales included. Embeddings, norms and the head stay as they are and are not "
        f"counted.{half}\n"
        "- Damages measured alone need not add up, and a plan is chosen as if they did; the plans' own numbers are measured."
    )


def percent(nll_change: float) -> str:
    """Returns a change of the mean negative log-likelihood as the perplexity's change."""
    return f"{100 * expm1(nll_change):+.2f} %"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
