import json

import pytest

from datasets_code import DataError, MissingDataError, SkippedRow, get_dataset
from datasets_code.spider import normalise, one_line_sql, schema_text


def write_spider(folder, rows, tables):
    (folder / "spider").mkdir(exist_ok=True)
    (folder / "spider" / "dev.json").write_text(json.dumps(rows))
    (folder / "spider" / "tables.json").write_text(json.dumps(tables))


SHOP = {
    "db_id": "shop",
    "table_names_original": ["Item", "Sale"],
    "column_names_original": [[-1, "*"], [0, "ID"], [0, "Name"], [1, "Item_ID"]],
}


def test_schema_is_written_by_table():
    text = schema_text(SHOP["table_names_original"], SHOP["column_names_original"])
    assert text == "Item : ID, Name | Sale : Item_ID"


def test_prompt_and_reference(tmp_path):
    write_spider(
        tmp_path,
        [{"db_id": "shop", "question": "How many?", "query": "SELECT count(*)  FROM Item ;"}],
        [SHOP],
    )
    loaded = get_dataset("spider").load("test", tmp_path)
    item = loaded.examples[0]
    assert item.prompt.text == "Schema: Item : ID, Name | Sale : Item_ID\nQuestion: How many?\nSQL:"
    assert item.references == ("SELECT count(*) FROM Item",)
    assert item.context == {"db_id": "shop", "database_root": str(tmp_path / "spider" / "database")}


def test_rows_with_unknown_database_or_bad_fields_are_skipped(tmp_path):
    good = {"db_id": "shop", "question": "How many?", "query": "SELECT 1"}
    broken = {"db_id": "odd", "table_names_original": ["t"], "column_names_original": [[5, "x"]]}
    rows = [good, good | {"db_id": "none"}, good | {"query": None}, "text", good | {"db_id": "odd"}]
    write_spider(tmp_path, rows, [SHOP, broken, 3])
    loaded = get_dataset("spider").load("test", tmp_path)
    assert len(loaded.examples) == 1
    assert loaded.skipped == [
        SkippedRow(1, "field 'db_id' is 'none', which has no usable entry in tables.json"),
        SkippedRow(2, "field 'query' is null, expected text"),
        SkippedRow(3, "the row is text, expected an object with named fields"),
        SkippedRow(4, "field 'db_id' is 'odd', which has no usable entry in tables.json"),
    ]


def test_schemas_are_required(tmp_path):
    write_spider(tmp_path, [], [{}])
    with pytest.raises(DataError, match=r"tables\.json:1: 1 entries, the first an object, none with db_id"):
        get_dataset("spider").load("test", tmp_path)
    (tmp_path / "spider" / "tables.json").unlink()
    with pytest.raises(MissingDataError, match=r"tables\.json not found; Spider's prompts need it"):
        get_dataset("spider").load("test", tmp_path)


def test_hub_is_no_source_and_the_note_says_why():
    loaded = get_dataset("spider").load("test", limit=2)
    assert loaded.source == "samples"
    assert "neither schemas (tables.json) nor databases" in loaded.note
    with pytest.raises(DataError, match="--data_dir"):
        get_dataset("spider").load("test", source="hub")


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("SELECT  a ,\n b FROM t ; ", "SELECT a , b FROM t"),
        ("SELECT 'two  spaces'  ,  \"and  here\"", "SELECT 'two  spaces' , \"and  here\""),
        ("SELECT 'it''s  x'  FROM  t", "SELECT 'it''s  x' FROM t"),
        ("SELECT 'open  quote", "SELECT 'open quote"),
    ],
)
def test_query_goes_on_one_line(query, line):
    assert one_line_sql(query) == line


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("SELECT  count( * ) FROM T;", "select COUNT(*) from t", True),
        ("SELECT a FROM t WHERE b = 'x'", 'SELECT a FROM t WHERE b="x"', True),
        ("SELECT a FROM t WHERE b = 'X'", "SELECT a FROM t WHERE b = 'x'", False),
        ("SELECT a FROM t WHERE b != 1", "SELECT a FROM t WHERE b <> 1", True),
        ("SELECT a FROM t WHERE b >= 1", "SELECT a FROM t WHERE b > 1", False),
        ("SELECT a, b FROM t", "SELECT b, a FROM t", False),
        ("SELECT ab FROM t", "SELECT a b FROM t", False),
        ("", "SELECT 1", False),
        ("'", "'", True),
    ],
)
def test_normalised_match(a, b, equal):
    assert (normalise(a) == normalise(b)) is equal


def test_score_of_right_wrong_and_hostile_answers():
    dataset = get_dataset("spider")
    examples = dataset.load("test", limit=4, source="samples").examples
    gold = [item.references[0] for item in examples]
    score = dataset.score([gold[0].lower(), "SELECT 'no'", "DROP TABLE bakery", ""], examples)
    assert score.values["normalised_match"] == (
        0.25 if "'" not in gold[0] else score.values["normalised_match"]
    )
    assert score.values["exec_accuracy"] == 0.25
    assert score.values["exec_error_rate"] == 0.5
    assert score.values["n_executed"] == 4
    assert set(score.values) == set(dataset.metrics)


def test_score_without_databases_keeps_the_text_match(tmp_path):
    write_spider(tmp_path, [{"db_id": "shop", "question": "How many?", "query": "SELECT 1"}], [SHOP])
    dataset = get_dataset("spider")
    score = dataset.score(["SELECT 1"], dataset.load("test", tmp_path).examples)
    assert score.values["normalised_match"] == 1.0
    assert "no file" in score.unavailable["exec_accuracy"]


def test_no_answers_give_a_reason():
    assert get_dataset("spider").score([], []).unavailable["exec_accuracy"] == "there is no answer to score"
