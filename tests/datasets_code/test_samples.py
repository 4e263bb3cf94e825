import sqlite3
from pathlib import Path

import pytest

from datasets_code import get_dataset
from datasets_code.base import SPLITS
from datasets_code.samples import generate
from datasets_code.sources import SAMPLES

NAMES = ["spider", "dialogsum", "e2e_nlg"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", SPLITS)
def test_samples_load_without_a_skipped_row(name, split):
    loaded = get_dataset(name).load(split, source="samples")
    assert len(loaded.examples) >= 24
    assert loaded.skipped == []
    assert len({item.id for item in loaded.examples}) == len(loaded.examples)


@pytest.mark.parametrize("name", NAMES)
def test_test_prompts_are_not_in_train(name):
    dataset = get_dataset(name)
    train = {item.prompt for item in dataset.load("train", source="samples").examples}
    assert not train & {item.prompt for item in dataset.load("test", source="samples").examples}


@pytest.mark.parametrize("name", ["dialogsum", "e2e_nlg"])
def test_test_split_has_three_references(name):
    assert {len(item.references) for item in get_dataset(name).load("test", source="samples").examples} == {3}


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_queries_run_and_agree_with_themselves(split):
    dataset = get_dataset("spider")
    examples = dataset.load(split, source="samples").examples
    values = dataset.score([item.references[0] for item in examples], examples).values
    assert values["exec_accuracy"] == values["normalised_match"] == 1.0
    assert (values["n_executed"], values["gold_error_count"]) == (len(examples), 0)


def content(path: Path) -> object:
    if path.suffix != ".sqlite":
        return path.read_text(encoding="utf-8")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return list(connection.iterdump())
    finally:
        connection.close()


def test_generator_writes_what_is_committed(tmp_path):
    generate.main(tmp_path)
    for name in NAMES:
        files = {path.relative_to(SAMPLES) for path in (SAMPLES / name).rglob("*") if path.is_file()}
        assert files == {
            path.relative_to(tmp_path) for path in (tmp_path / name).rglob("*") if path.is_file()
        }
        for file in files:
            assert content(SAMPLES / file) == content(tmp_path / file), file
