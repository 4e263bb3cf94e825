"""Small databases, and the questions and queries that follow from what their tables are about.

Each database has a parent and a child table (a bakery sells cakes). Templates over the two give questions from a plain
count up to joins with a group.
"""

# ruff: noqa: S608 - these queries are data

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

Value = str | int | float


@dataclass(frozen=True)
class Table:
    """A table, and the words for what it holds.

    Attributes:
        name: table name; its key is `<name>_id`.
        nouns: singular and plural.
        label: column with the name of a row.
        number: column, words for it, lowest and highest value.
        kind: column, words for it, and its values.
        labels: names of the rows; their number is the table's.
    """

    name: str
    nouns: tuple[str, str]
    label: str
    number: tuple[str, str, int, int]
    kind: tuple[str, str, tuple[str, ...]]
    labels: tuple[str, ...]

    @property
    def key(self) -> str:
        """The primary key's column."""
        return f"{self.name}_id"

    def columns(self) -> list[tuple[str, str]]:
        """Returns the columns with their types, without a key to a parent."""
        return [
            (self.key, "number"),
            (self.label, "text"),
            (self.number[0], "number"),
            (self.kind[0], "text"),
        ]


@dataclass(frozen=True)
class Database:
    """A parent table and a child table that points to it."""

    name: str
    split: str
    parent: Table
    child: Table


DATABASES = (
    Database(
        "bakery_orders",
        "dev",
        Table(
            "bakery",
            ("bakery", "bakeries"),
            "bakery_name",
            ("opening_year", "opening year", 1950, 2020),
            ("district", "district", ("North", "South", "Harbour")),
            ("Golden Crust", "Early Oven", "Rye and Shine", "Flour Power", "Corner Loaf", "Sweet Mill"),
        ),
        Table(
            "cake",
            ("cake", "cakes"),
            "cake_name",
            ("price", "price", 8, 45),
            ("flavor", "flavor", ("lemon", "chocolate", "walnut", "cherry")),
            ("Sunrise", "Velvet", "Snowdrop", "Amber", "Forest", "Cloud", "Ruby", "Autumn", "Pearl", "Comet"),
        ),
    ),
    Database(
        "sailing_club",
        "dev",
        Table(
            "sailor",
            ("sailor", "sailors"),
            "name",
            ("age", "age", 18, 70),
            ("nationality", "nationality", ("Norway", "Chile", "Greece")),
            (
                "Ingrid Holm",
                "Pablo Reyes",
                "Nikos Dimas",
                "Astrid Vang",
                "Lucia Soto",
                "Elena Kosta",
                "Ole Berg",
            ),
        ),
        Table(
            "boat",
            ("boat", "boats"),
            "boat_name",
            ("length_in_meters", "length", 5, 22),
            ("color", "color", ("white", "blue", "red")),
            ("Petrel", "Albatross", "Puffin", "Dolphin", "Seal", "Orca", "Tern", "Gannet", "Skua", "Otter"),
        ),
    ),
    Database(
        "science_museum",
        "dev",
        Table(
            "hall",
            ("hall", "halls"),
            "hall_name",
            ("capacity", "capacity", 40, 300),
            ("floor", "floor", ("ground", "first", "second")),
            ("Light", "Water", "Sound", "Motion", "Space"),
        ),
        Table(
            "exhibit",
            ("exhibit", "exhibits"),
            "title",
            ("year_built", "year built", 1890, 2022),
            ("condition", "condition", ("good", "fair", "poor")),
            (
                "Prism",
                "Pendulum",
                "Steam Pump",
                "Star Globe",
                "Organ Pipe",
                "Water Clock",
                "Gyroscope",
                "Telescope",
            ),
        ),
    ),
    Database(
        "village_library",
        "train",
        Table(
            "author",
            ("author", "authors"),
            "author_name",
            ("birth_year", "birth year", 1900, 1995),
            ("country", "country", ("Iceland", "Kenya", "Peru")),
            ("Jon Arnar", "Wanjiru Otieno", "Rosa Quispe", "Helga Finn", "Amani Kip", "Diego Luna"),
        ),
        Table(
            "book",
            ("book", "books"),
            "title",
            ("pages", "number of pages", 80, 900),
            ("genre", "genre", ("novel", "poetry", "history")),
            (
                "Salt",
                "Night Train",
                "The Well",
                "Paper Birds",
                "Ash",
                "Two Rivers",
                "Harvest",
                "Echo",
                "Moss",
            ),
        ),
    ),
    Database(
        "mountain_huts",
        "train",
        Table(
            "hut",
            ("hut", "huts"),
            "hut_name",
            ("altitude", "altitude", 900, 3200),
            ("region", "region", ("East", "West", "Central")),
            ("Eagle", "Marmot", "Gentian", "Glacier", "Larch", "Ibex"),
        ),
        Table(
            "guest",
            ("guest", "guests"),
            "guest_name",
            ("nights", "number of nights", 1, 9),
            ("membership", "membership", ("gold", "silver", "none")),
            ("Ada", "Bruno", "Carla", "Dario", "Edda", "Felix", "Gita", "Hugo", "Ines", "Jonas", "Kira"),
        ),
    ),
    Database(
        "farm_market",
        "train",
        Table(
            "farmer",
            ("farmer", "farmers"),
            "farmer_name",
            ("acres", "number of acres", 5, 200),
            ("village", "village", ("Ashby", "Milden", "Orwell")),
            ("Mr. Hale", "Mrs. Dunn", "Mr. Pike", "Ms. Rowe", "Mrs. Yates", "Mr. Boyd"),
        ),
        Table(
            "product",
            ("product", "products"),
            "product_name",
            ("weekly_sales", "weekly sales", 10, 500),
            ("season", "season", ("spring", "summer", "autumn")),
            (
                "Carrots",
                "Plums",
                "Honey",
                "Cheese",
                "Beans",
                "Apples",
                "Eggs",
                "Pumpkins",
                "Leeks",
                "Berries",
            ),
        ),
    ),
)


def fill(database: Database) -> dict[str, list[tuple[Value, ...]]]:
    """Returns the rows of both tables; the last parent has no child."""
    source = random.Random(database.name)
    parents = [row(database.parent, number, source) for number in range(len(database.parent.labels))]
    children = [
        (*row(database.child, number, source), source.randint(1, len(parents) - 1))
        for number in range(len(database.child.labels))
    ]
    return {database.parent.name: parents, database.child.name: list(children)}


def row(table: Table, number: int, source: random.Random) -> tuple[Value, ...]:
    """Returns one row of a table: key, label, number, kind."""
    low, high = table.number[2:]
    return (number + 1, table.labels[number], source.randint(low, high), source.choice(table.kind[2]))


def columns(database: Database) -> dict[str, list[tuple[str, str]]]:
    """Returns table -> columns with types; the child's last one points to the parent."""
    child = [*database.child.columns(), (database.parent.key, "number")]
    return {database.parent.name: database.parent.columns(), database.child.name: child}


def table_questions(table: Table) -> list[tuple[str, str]]:
    """Returns questions over one table with their queries."""
    one, many = table.nouns
    name, words = table.label, table.label.replace("_", " ")
    number, measure, low, high = table.number
    kind, sort, values = table.kind
    middle = (low + high) // 2
    return [
        (f"How many {many} are there?", f"SELECT count(*) FROM {table.name}"),
        (f"List the {words} and {measure} of every {one}.", f"SELECT {name} , {number} FROM {table.name}"),
        (
            f"What is the {words} of each {one} whose {measure} is above {middle}?",
            f"SELECT {name} FROM {table.name} WHERE {number} > {middle}",
        ),
        (f"What is the average {measure} of all {many}?", f"SELECT avg({number}) FROM {table.name}"),
        (
            f"Show each {sort} and its number of {many}.",
            f"SELECT {kind} , count(*) FROM {table.name} GROUP BY {kind}",
        ),
        (
            f"Which {one} has the highest {measure}? Give the {words}.",
            f"SELECT {name} FROM {table.name} ORDER BY {number} DESC LIMIT 1",
        ),
        (
            f"Find the {words} of all {many} whose {sort} is {values[0]}.",
            f"SELECT {name} FROM {table.name} WHERE {kind} = '{values[0]}'",
        ),
        (
            f"Give the {words} of all {many} in ascending order of {measure}.",
            f"SELECT {name} FROM {table.name} ORDER BY {number} ASC",
        ),
        (
            f"What are the largest and the smallest {measure} of {many} whose {sort} is not {values[1]}?",
            f"SELECT max({number}) , min({number}) FROM {table.name} WHERE {kind} != '{values[1]}'",
        ),
    ]


def join_questions(database: Database) -> list[tuple[str, str]]:
    """Returns questions over both tables with their queries."""
    parent, child = database.parent, database.child
    (one, many), (item, items) = parent.nouns, child.nouns
    key = parent.key
    name, words = parent.label, parent.label.replace("_", " ")
    join = f"FROM {parent.name} AS T1 JOIN {child.name} AS T2 ON T1.{key} = T2.{key}"
    article = "an" if item[0] in "aeiou" else "a"
    child_words = child.label.replace("_", " ")
    return [
        (
            f"Show the {words} of each {one} and its number of {items}.",
            f"SELECT T1.{name} , count(*) {join} GROUP BY T1.{key}",
        ),
        (
            f"Show the {child_words} of each {item} and the {words} of its {one}.",
            f"SELECT T2.{child.label} , T1.{name} {join}",
        ),
        (
            f"What is the {words} of every {one} without any {item}?",
            f"SELECT {name} FROM {parent.name} WHERE {key} NOT IN (SELECT {key} FROM {child.name})",
        ),
        (
            f"Which {one} has the most {items}? Show its {words}.",
            f"SELECT T1.{name} {join} GROUP BY T1.{key} ORDER BY count(*) DESC LIMIT 1",
        ),
        (
            f"Find the {words} of {many} that have at least two {items}.",
            f"SELECT T1.{name} {join} GROUP BY T1.{key} HAVING count(*) >= 2",
        ),
        (
            f"What are the different {words}s of {many} that have {article} {item} whose {child.kind[1]} is {child.kind[2][0]}?",
            f"SELECT DISTINCT T1.{name} {join} WHERE T2.{child.kind[0]} = '{child.kind[2][0]}'",
        ),
    ]


def questions(database: Database) -> list[dict[str, str]]:
    """Returns all rows of a database in the official order of fields."""
    pairs = [*table_questions(database.parent), *table_questions(database.child), *join_questions(database)]
    return [{"db_id": database.name, "question": question, "query": query} for question, query in pairs]


def schema_entry(database: Database) -> dict[str, Any]:
    """Returns a database's entry in `tables.json`."""
    tables = columns(database)
    names: list[list[Any]] = [[-1, "*"]]
    types = ["text"]
    for number, own in enumerate(tables.values()):
        names.extend([number, name] for name, _ in own)
        types.extend(kind for _, kind in own)
    parent_key, child_key = 1, 1 + len(tables[database.parent.name])
    return {
        "column_names": [[table, name.replace("_", " ").lower()] for table, name in names],
        "column_names_original": names,
        "column_types": types,
        "db_id": database.name,
        "foreign_keys": [[len(names) - 1, parent_key]],
        "primary_keys": [parent_key, child_key],
        "table_names": [name.replace("_", " ") for name in tables],
        "table_names_original": list(tables),
    }
