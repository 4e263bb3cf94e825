import json

import pytest

from datasets_code import MissingDataError, get_dataset


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_file_or_folder(tmp_path):
    rows = [{"prompt": "Say hi: ", "completion": "  hi \n"}, {"id": 7, "prompt": "", "completion": "x"}]
    path = write(tmp_path / "jsonl" / "train.jsonl", rows)
    dataset = get_dataset("jsonl")
    loaded = dataset.load("train", path)
    assert loaded.examples == dataset.load("train", tmp_path).examples
    assert [(item.id, item.prompt.text) for item in loaded.examples] == [("train_0", "Say hi:"), ("7", "")]
    assert dataset.completion(loaded.examples[0]) == " hi"
    assert dataset.score(["hi", "x"], loaded.examples).values["rouge1"] == 1.0


def test_unusable_rows_are_skipped(tmp_path):
    rows = [
        {"completion": "x"},
        {"prompt": 3, "completion": "x"},
        {"prompt": "p", "completion": ""},
        {"prompt": "p", "completion": "c", "id": None},
        {"prompt": "p", "completion": "c"},
    ]
    loaded = get_dataset("jsonl").load("test", write(tmp_path / "own.jsonl", rows))
    assert len(loaded.examples) == 1
    assert [row.reason for row in loaded.skipped] == [
        "field 'prompt' is missing",
        "field 'prompt' is a number, expected text",
        "field 'completion' is empty",
        "field 'id' is null, expected text or a number",
    ]


def test_missing_file_says_what_is_expected(tmp_path):
    with pytest.raises(MissingDataError, match=r"own\.jsonl not found; expected a file of JSON lines"):
        get_dataset("jsonl").load("train", tmp_path / "own.jsonl")
    (tmp_path / "jsonl").mkdir()
    with pytest.raises(MissingDataError, match=r"test\.jsonl not found; expected JSON lines with 'prompt'"):
        get_dataset("jsonl").load("test", tmp_path)
    with pytest.raises(
        MissingDataError,
        match="has no samples of its own. Give files with --data_dir. It takes a file of JSON lines",
    ):
        get_dataset("jsonl").load("test")
    with pytest.raises(MissingDataError, match="has no samples of its own"):
        get_dataset("jsonl").load("test", source="samples")
