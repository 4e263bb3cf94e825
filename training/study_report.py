"""What a study found: one JSON file with everything, and a table for each thing that was varied."""

from __future__ import annotations

import datetime
from typing import Any

from huggingface.transformers.generation.tree_worth import grow_tree
from training.study_plan import Plan, StudyFlags, names_in_order

BUDGETS = (8, 16, 32, 64)
SHOWN = ("streams", "stream_layers", "transition_rank", "lora_rank", "targets")


def study_document(
    flags: StudyFlags, plan: Plan, results: dict[str, dict[str, Any]], failures: dict[str, str]
) -> dict[str, Any]:
    """Returns the study as `study.json` holds it.

    Args:
        flags: the study's flags.
        plan: its jobs.
        results: what each finished job wrote, by name.
        failures: why others did not finish, by name.
    """
    names = names_in_order(plan, list(plan.groups))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": {name: str(value) for name, value in vars(flags).items()},
        "groups": {group: list(members) for group, members in plan.groups.items()},
        "needed": {job.name: results.get(job.name) for job in plan.jobs if job.kind != "variant"},
        "variants": [variant_entry(results[name]) for name in names if name in results],
        "failures": failures,
    }


def variant_entry(result: dict[str, Any]) -> dict[str, Any]:
    """Returns a finished variant's result with the tokens that a tree grown for each set alone would be worth."""
    tables = {name: part["rank_accuracy"] for name, part in result["sets"].items()}
    expected = {
        name: {str(nodes): round(grow_tree(table, nodes, len(table))[1], 4) for nodes in BUDGETS}
        for name, table in tables.items()
    }
    return {**result, "expected_with_own_tree": expected}


def study_tables(document: dict[str, Any]) -> str:
    """Returns the study in Markdown, one table a group."""
    by_name = {entry["name"]: entry for entry in document["variants"]}
    found = [entry["hardware"] for entry in document["variants"]]
    where = sorted({f"{part['device']}, {part['dtype']}, torch {part['torch']}" for part in found})
    lines = [
        "# Acceptance by shape of the streams",
        "",
        f"{document['date'][:10]}. {'; '.join(where)}. Acceptance length: tokens a decode step emits, bonus token included, "
        f"on held-out prompts continued greedily by the model itself, at {'/'.join(map(str, BUDGETS))} draft nodes (root "
        "included); one tree for all sets. Rank-1: how often each stream's best guess was right.",
    ]
    for group, members in document["groups"].items():
        entries = [by_name[name] for name in members if name in by_name]
        if entries:
            lines += ["", f"## {group}", "", *group_table(entries)]
    for name, reason in document["failures"].items():
        lines += ["", f"Not finished: {name}: {reason}"]
    return "\n".join(lines) + "\n"


def group_table(entries: list[dict[str, Any]]) -> list[str]:
    """Returns the lines of one table."""
    sets = list(entries[0]["sets"])
    head = ["variant", "steps", "minutes", "rank-1", *sets]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] + ['---:'] * (len(head) - 1))} |"]
    for entry in entries:
        first = " / ".join(f"{ranks[0]:.2f}" for ranks in entry["rank_accuracy"])
        cells = [entry["name"], f"{entry['steps']:,}", f"{entry['minutes']:.1f}", first]
        lines.append(f"| {' | '.join([*cells, *(lengths_cell(entry['sets'].get(name)) for name in sets)])} |")
    return lines


def lengths_cell(part: dict[str, Any] | None) -> str:
    """Returns a set's acceptance lengths by budget."""
    if part is None:
        return ""
    values = [part["acceptance_length"].get(str(nodes)) for nodes in BUDGETS]
    return " / ".join("" if value is None else f"{value:.2f}" for value in values)
