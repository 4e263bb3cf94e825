"""Spider: questions over databases the model has never seen, answered in SQL (Yu et al., EMNLP 2018).

The official test set was not public for long, so `test` and `validation` are both the dev set. Whoever tunes
anything must hold out databases of `train` instead (`context["db_id"]` tells them apart).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets_code.base import (
    Dataset,
    Example,
    Prompt,
    Row,
    RowError,
    Score,
    describe,
    one_line,
    text_field,
)
from datasets_code.files import read_json_array
from datasets_code.sources import DataError, MissingDataError
from datasets_code.sql_sandbox import EXECUTION, Execution, execution_score, judge_all
from datasets_code.text_scores import absent, check_pairs

FILES = {"train": "train_spider.json", "validation": "dev.json", "test": "dev.json"}
MATCH = "normalised_match"
QUOTED = re.compile(r"('(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")")
TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|<>|[<>=!]=|[\w.]+|\S")


class Spider(Dataset):
    """Schema and question to SQL, scored by text match and by running both queries."""

    name = "spider"
    metrics = (MATCH, *EXECUTION)
    no_hub = (
        "the hub's copy has neither schemas (tables.json) nor databases, so no prompt can be built from it"
    )

    def read(self, folder: Path, split: str) -> list[Any]:
        """Returns the questions, each with its database's schema and the folder of databases."""
        rows = read_json_array(folder / FILES[split])
        schemas = read_schemas(folder / "tables.json")
        extra = {"schemas": schemas, "database_root": str(folder / "database")}
        return [{**row, **extra} if isinstance(row, dict) else row for row in rows]

    def example(self, row: Row, index: int, split: str) -> Example:
        """Returns a question over a schema; the reference is the gold query on one line."""
        db_id, question = text_field(row, "db_id"), one_line(text_field(row, "question"))
        query = one_line_sql(text_field(row, "query"))
        schema = row["schemas"].get(db_id)
        if schema is None:
            raise RowError(f"field 'db_id' is '{db_id[:80]}', which has no usable entry in tables.json")
        return Example(
            id=f"{'train' if split == 'train' else 'dev'}_{index}",
            prompt=Prompt(f"Schema: {schema}\nQuestion: {question}\nSQL:"),
            references=(query,),
            context={"db_id": db_id, "database_root": row["database_root"]},
        )

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> Score:
        """Returns normalised match, and execution accuracy with its error, timeout and exclusion counts."""
        check_pairs(predictions, [item.references for item in examples])
        if not predictions:
            return absent(self.metrics, "there is no answer to score")
        gold = [item.references[0] for item in examples]
        matches = sum(normalise(a) == normalise(b) for a, b in zip(predictions, gold, strict=True))
        executions = [
            Execution(item.context["database_root"], item.context["db_id"], item.references[0], prediction)
            for item, prediction in zip(examples, predictions, strict=True)
        ]
        match = Score(
            {MATCH: matches / len(predictions)}, notes={MATCH: "same tokens up to case, spaces and quotes"}
        )
        return match.merged(execution_score(judge_all(executions)))


def read_schemas(path: Path) -> Mapping[str, str]:
    """Returns database -> schema as text, `table : column, column | table : ...`, names as in the database.

    Raises:
        DataError, MissingDataError: as for any file, and if no entry is usable.
    """
    if not path.is_file():
        raise MissingDataError(
            f"{path} not found; Spider's prompts need it. It is part of the official release."
        )
    entries = read_json_array(path)
    schemas: dict[str, str] = {}
    for entry in entries:
        try:
            schemas[entry["db_id"]] = schema_text(
                entry["table_names_original"], entry["column_names_original"]
            )
        except (KeyError, TypeError, ValueError, IndexError):
            continue  # its questions are skipped, each with this entry named
    if not schemas:
        found = f"{len(entries)} entries, the first {describe(entries[0])}" if entries else "no entry"
        raise DataError(
            f"{path}:1: {found}, none with db_id and original names; fetch the official file again."
        )
    return schemas


def schema_text(tables: Sequence[str], columns: Sequence[tuple[int, str]]) -> str:
    """Returns a schema on one line; a column names its table by index, and -1 is the star."""
    names: list[list[str]] = [[] for _ in tables]
    for table, column in columns:
        if table >= 0:
            names[table].append(column)
    return " | ".join(f"{table} : {', '.join(own)}" for table, own in zip(tables, names, strict=True))


def one_line_sql(query: str) -> str:
    """Returns a query with white space outside quotes as single spaces, and no semicolon at its end."""
    parts = QUOTED.split(query.strip().rstrip("; \t\r\n"))
    return "".join(part if number % 2 else re.sub(r"\s+", " ", part) for number, part in enumerate(parts))


def normalise(query: str) -> tuple[str, ...]:
    """Returns a query's tokens for comparison: lower case and one kind of quotes; quoted text keeps its case.

    This is text match, not Spider's official exact set match: renamed aliases or reordered conditions differ.
    """
    tokens = TOKEN.findall(query.strip().rstrip("; \t\r\n"))
    return tuple(
        f"'{token[1:-1]}'" if token[0] in "'\"" and len(token) > 1 else fold(token) for token in tokens
    )


def fold(token: str) -> str:
    """Returns an unquoted token in lower case, with one spelling of 'not equal'."""
    return "!=" if token == "<>" else token.lower()
