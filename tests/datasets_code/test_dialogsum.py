import json

from datasets_code import get_dataset


def test_prompt_references_and_score(tmp_path):
    (tmp_path / "dialogsum").mkdir()
    row = {"fname": "test_0", "dialogue": "#Person1#: Hi. \r\n\r\n#Person2#: Hello.\n", "topic1": "x"}
    row |= {f"summary{number}": f"They  greet\n{number}." for number in (1, 2, 3)}
    (tmp_path / "dialogsum" / "dialogsum.test.jsonl").write_text(json.dumps(row))
    dataset = get_dataset("dialogsum")
    examples = dataset.load("test", tmp_path).examples
    assert examples[0].prompt.text == "Dialogue:\n#Person1#: Hi.\n#Person2#: Hello.\nSummary:"
    assert examples[0].references == ("They greet 1.", "They greet 2.", "They greet 3.")
    assert dataset.completion(examples[0]) == " They greet 1."
    assert dataset.score(["They greet 3."], examples).values == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert set(dataset.metrics) == {"rouge1", "rouge2", "rougeL"}


def test_row_without_summary_is_skipped(tmp_path):
    (tmp_path / "dialogsum").mkdir()
    rows = [
        {"dialogue": "#Person1#: Hi.", "summary": "x"},
        {"dialogue": "#Person1#: Hi.", "summary1": "x", "summary2": None},
    ]
    rows.append({"dialogue": "#Person1#: Hi."})
    (tmp_path / "dialogsum" / "dialogsum.test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    loaded = get_dataset("dialogsum").load("test", tmp_path)
    assert [item.id for item in loaded.examples] == ["test_0"]
    assert [row.reason for row in loaded.skipped] == [
        "field 'summary2' is null, expected text",
        "field 'summary' is missing",
    ]


def test_equal_dialogues_under_two_names_stay_two(tmp_path):
    (tmp_path / "dialogsum").mkdir()
    rows = [{"fname": name, "dialogue": "#Person1#: Hi.", "summary": "x"} for name in ("test_0", "test_1")]
    (tmp_path / "dialogsum" / "dialogsum.test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert len(get_dataset("dialogsum").load("test", tmp_path).examples) == 2
