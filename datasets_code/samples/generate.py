"""Writes the project's own samples, always the same ones: `python -m datasets_code.samples.generate [folder]`."""

from __future__ import annotations

import csv
import json
import random
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets_code.samples import small_databases
from datasets_code.samples.dialogue_scripts import SCRIPTS, Script
from datasets_code.samples.restaurant_texts import draw_meaning, notation, say
from datasets_code.samples.small_databases import DATABASES, Database

SEED = 20_24
SIZES = {"train": 48, "dev": 24, "test": 24}
DEV_QUESTIONS = 12


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def fill_script(script: Script, source: random.Random) -> tuple[str, list[str]]:
    """Returns a dialogue and its three summaries, with the blanks filled in."""
    words = {slot: source.choice(options) for slot, options in script.slots.items()}
    turns = [
        f"#Person{1 + number % 2}#: {source.choice(wordings).format(**words)}"
        for number, wordings in enumerate(script.turns)
    ]
    return "\n".join(turns), [summary.format(**words) for summary in script.summaries]


def write_dialogues(folder: Path) -> None:
    """Writes the dialogues of all splits; none occurs twice."""
    source, seen = random.Random(SEED), set()
    for split, size in SIZES.items():
        rows: list[dict[str, Any]] = []
        while len(rows) < size:
            script = SCRIPTS[len(rows) % len(SCRIPTS)]
            dialogue, summaries = fill_script(script, source)
            if dialogue in seen:
                continue
            seen.add(dialogue)
            row: dict[str, Any] = {"fname": f"{split}_{len(rows)}", "dialogue": dialogue}
            if split == "test":
                for number, summary in enumerate(summaries, start=1):
                    row |= {f"summary{number}": summary, f"topic{number}": script.topic}
            else:
                row |= {"summary": source.choice(summaries), "topic": script.topic}
            rows.append(row)
        write_json_lines(folder / f"dialogsum.{split}.jsonl", rows)


def write_restaurants(folder: Path) -> None:
    """Writes the restaurants of all splits; no meaning occurs in two of them."""
    files = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
    source, seen = random.Random(SEED), set()
    for split, size in SIZES.items():
        rows: list[tuple[str, str]] = []
        for _ in range(size):
            meaning = draw_meaning(source)
            while notation(meaning) in seen:
                meaning = draw_meaning(source)
            seen.add(notation(meaning))
            rows.extend((notation(meaning), text) for text in say(meaning))
        with (folder / files[split]).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("mr", "ref"))
            writer.writerows(rows)


def write_database(folder: Path, database: Database) -> None:
    """Writes one SQLite file with both tables."""
    path = folder / database.name / f"{database.name}.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    rows = small_databases.fill(database)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA page_size = 1024")  # small files: most of a larger page would stay empty
    for name, columns in small_databases.columns(database).items():
        declared = [f"{column} {'INTEGER' if kind == 'number' else 'TEXT'}" for column, kind in columns]
        declared[0] += " PRIMARY KEY"
        if name == database.child.name:
            declared[-1] += f" REFERENCES {database.parent.name}({database.parent.key})"
        connection.execute(f"CREATE TABLE {name} ({', '.join(declared)})")
        marks = ", ".join("?" * len(columns))
        connection.executemany(f"INSERT INTO {name} VALUES ({marks})", rows[name])  # noqa: S608 - own names
    connection.commit()
    connection.close()


def write_databases(folder: Path) -> None:
    """Writes schemas, questions and databases; as in Spider, dev asks about databases that train does not know."""
    source = random.Random(SEED)
    chosen: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
    for database in DATABASES:
        rows = small_databases.questions(database)
        if database.split == "dev":
            rows = [rows[index] for index in sorted(source.sample(range(len(rows)), DEV_QUESTIONS))]
        chosen[database.split].extend(rows)
        write_database(folder / "database", database)
    for name, content in (
        ("train_spider.json", chosen["train"]),
        ("dev.json", chosen["dev"]),
        ("tables.json", [small_databases.schema_entry(database) for database in DATABASES]),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(folder: Path) -> None:
    """Writes all samples under a folder."""
    for name, write in (
        ("dialogsum", write_dialogues),
        ("e2e_nlg", write_restaurants),
        ("spider", write_databases),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
