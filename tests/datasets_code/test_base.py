import json
import subprocess
import sys
from pathlib import Path

import pytest

from datasets_code import DATASETS, DataError, MissingDataError, get_dataset
from datasets_code.base import Example, Prompt, SkippedRow, draw, with_unique_ids
from datasets_code.hub import HubRows, HubSource, HubUnavailable


def write_dialogues(folder: Path, rows: list[object], split: str = "test") -> Path:
    (folder / "dialogsum").mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / "dialogsum" / f"dialogsum.{split}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dialogue(number: int) -> dict[str, object]:
    return {
        "fname": f"test_{number}",
        "dialogue": f"#Person1#: Hi {number}.",
        "summary": f"They greet {number}.",
    }


def no_hub(_source: HubSource, _split: str) -> HubRows:
    raise HubUnavailable("the hub is out of reach")


def test_same_limit_and_seed_give_the_same_sample():
    dataset = get_dataset("dialogsum")
    first = dataset.load("test", limit=7, seed=3, source="samples").examples
    assert first == dataset.load("test", limit=7, seed=3, source="samples").examples
    assert first != dataset.load("test", limit=7, seed=4, source="samples").examples
    assert len(first) == 7


def test_sample_of_known_seed_does_not_drift():
    items = [Example(str(number), Prompt(""), ()) for number in range(10)]
    assert [item.id for item in draw(items, 4, 0)] == ["1", "5", "7", "8"]


def test_larger_limit_keeps_the_smaller_ones_examples_in_order():
    dataset = get_dataset("e2e_nlg")
    small = dataset.load("test", limit=5, source="samples").examples
    large = dataset.load("test", limit=12, source="samples").examples
    assert [item for item in large if item in small] == small


def test_limit_beyond_the_set_gives_all():
    dataset = get_dataset("dialogsum")
    everything = dataset.load("test", source="samples").examples
    assert dataset.load("test", limit=10_000, source="samples").examples == everything


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match="at least 1"):
        get_dataset("dialogsum").load(limit=limit, source="samples")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'nope' is unknown; choose from spider"):
        get_dataset("nope")
    with pytest.raises(ValueError, match="split 'dev'"):
        get_dataset("spider").load("dev")
    with pytest.raises(ValueError, match="source 'web'"):
        get_dataset("spider").load(source="web")


def test_unusable_rows_are_skipped_with_index_and_reason(tmp_path):
    rows: list[object] = [dialogue(0), {"fname": "x", "summary": "No dialogue."}, dialogue(2)]
    rows += [
        dialogue(3) | {"dialogue": None},
        dialogue(4) | {"summary": 5},
        [1, 2],
        dialogue(6) | {"summary": " "},
    ]
    write_dialogues(tmp_path, rows)
    loaded = get_dataset("dialogsum").load("test", tmp_path)
    assert [item.id for item in loaded.examples] == ["test_0", "test_2"]
    assert loaded.skipped == [
        SkippedRow(1, "field 'dialogue' is missing"),
        SkippedRow(3, "field 'dialogue' is null, expected text"),
        SkippedRow(4, "field 'summary' is a number, expected text"),
        SkippedRow(5, "the row is a list, expected an object with named fields"),
        SkippedRow(6, "field 'summary' is empty"),
    ]


def test_set_without_a_usable_row_is_an_error(tmp_path):
    write_dialogues(tmp_path, [{"fname": "x"}])
    with pytest.raises(DataError, match="no usable row; row 0: field 'dialogue' is missing"):
        get_dataset("dialogsum").load("test", tmp_path)
    write_dialogues(tmp_path, [])
    with pytest.raises(DataError, match="it holds no row"):
        get_dataset("dialogsum").load("test", tmp_path)


def test_duplicate_ids_become_unique():
    items = [Example(name, Prompt(""), ()) for name in ("a", "a#2", "a", "b", "a")]
    assert [item.id for item in with_unique_ids(items)] == ["a", "a#2", "a#3", "b", "a#4"]


def test_missing_folders_name_what_was_expected(tmp_path):
    with pytest.raises(MissingDataError, match=r"is not a folder; give one that holds 'spider/'"):
        get_dataset("spider").load("test", tmp_path / "nowhere")
    with pytest.raises(
        MissingDataError, match=r"has no folder 'spider'; expected the official files in .*spider"
    ):
        get_dataset("spider").load("test", tmp_path)
    (tmp_path / "spider").mkdir()
    with pytest.raises(MissingDataError, match=r"dev\.json not found"):
        get_dataset("spider").load("test", tmp_path)
    with pytest.raises(MissingDataError, match="needs --data_dir"):
        get_dataset("spider").load("test", source="data_dir")


def test_without_hub_the_samples_are_used_and_the_note_says_why():
    loaded = DATASETS["dialogsum"](no_hub).load("test")
    assert (loaded.source, loaded.note) == ("samples", "the hub is out of reach")


def test_hub_asked_for_by_name_is_an_error_that_says_what_to_do():
    with pytest.raises(
        DataError, match="dialogsum: the hub is out of reach. Give the official files with --data_dir"
    ):
        DATASETS["dialogsum"](no_hub).load("test", source="hub")


def test_data_dir_goes_before_the_hub(tmp_path):
    write_dialogues(tmp_path, [dialogue(0)])
    loaded = DATASETS["dialogsum"](no_hub).load("test", tmp_path)
    assert (loaded.source, loaded.note) == (f"data_dir:{tmp_path / 'dialogsum'}", "")


def test_hub_rows_take_the_same_path():
    def fetch(source: HubSource, split: str) -> HubRows:
        assert (source.repo, split) == ("knkarthick/dialogsum", "test")
        rows = [
            dialogue(0) | {"fname": f"test_0_{number}", "summary": f"Summary {number}."}
            for number in (1, 2, 3)
        ]
        return HubRows([*rows, dialogue(1) | {"dialogue": None}], "abc123")

    loaded = DATASETS["dialogsum"](fetch).load("test")
    assert loaded.source == "hub:knkarthick/dialogsum@abc123"
    assert [(item.id, item.references) for item in loaded.examples] == [
        ("test_0", ("Summary 1.", "Summary 2.", "Summary 3."))
    ]
    assert [row.index for row in loaded.skipped] == [3]


@pytest.mark.parametrize("name", ["spider", "dialogsum", "e2e_nlg"])
def test_prompt_and_completion_join_at_one_space(name):
    dataset = get_dataset(name)
    for item in dataset.load("train", source="samples").examples:
        assert not item.prompt.text.endswith(" ")
        completion = dataset.completion(item)
        assert completion[0] == " " and completion[1] != " "
        assert completion[1:] == item.references[0]


def test_package_imports_no_torch():
    code = "import sys, datasets_code; sys.exit(any(name in sys.modules for name in ('torch', 'datasets', 'pandas')))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
