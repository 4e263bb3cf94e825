from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from datasets_code import DataError, MissingDataError
from training.data import check_sources, draw, load_text, split_by_group

from .conftest import text_pairs, write_rows


def test_own_file_is_parted_by_prompt(tmp_path):
    data = load_text([], None, write_rows(tmp_path / "own.jsonl", text_pairs(200)))
    (part,) = data.sets
    assert len(part.train) + len(part.held_out) == 200
    assert 0 < len(part.held_out) < 60
    assert not {pair.prompt for pair in part.train} & {pair.prompt for pair in part.held_out}
    assert all(pair.completion.startswith(" ") for pair in part.train)


def test_validation_file_is_the_held_out_part(tmp_path):
    train = write_rows(tmp_path / "a.jsonl", text_pairs(10))
    held_out = write_rows(tmp_path / "b.jsonl", text_pairs(4, seed=1))
    (part,) = load_text([], None, train, held_out).sets
    assert (len(part.train), len(part.held_out)) == (10, 4)


@pytest.mark.parametrize("line", ['{"prompt": "x"', "nonsense", '{"prompt": "a", "completion": "b"'])
def test_an_unreadable_line_is_named(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"own\.jsonl:2"):
        load_text([], None, path)


def test_an_empty_file_is_an_error(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="no usable row"):
        load_text([], None, path)


def test_a_row_without_completion_is_skipped_and_counted(tmp_path):
    path = write_rows(tmp_path / "own.jsonl", text_pairs(10))
    path.write_text(path.read_text() + json.dumps({"prompt": "a", "completion": None}) + "\n")
    assert load_text([], None, path).sets[0].skipped == 1


def test_a_row_that_no_tokenizer_takes_is_skipped_and_counted(tmp_path):
    path = write_rows(tmp_path / "own.jsonl", text_pairs(10))
    broken = [{"prompt": "a\ud800", "completion": "b"}, {"prompt": "a", "completion": "\udc00b"}]
    lines = [json.dumps(row) for row in broken]
    path.write_text(path.read_text() + "\n".join(lines))
    (part,) = load_text([], None, path, path).sets
    assert (len(part.train), len(part.held_out), part.skipped) == (10, 10, 4)
    path.write_text(lines[0])
    with pytest.raises(DataError, match=r"surrogate pair, such as .ud800; check the files"):
        load_text([], None, path)


def test_an_empty_prompt_is_an_error(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "", "completion": "b"}\n')
    with pytest.raises(DataError, match="empty prompt"):
        load_text([], None, path)


def test_missing_sources_are_told_before_reading(tmp_path):
    with pytest.raises(ValueError, match="choose from spider, dialogsum, e2e_nlg"):
        check_sources(["spyder"], None, {})
    with pytest.raises(MissingDataError, match="--data_dir"):
        check_sources(["spider"], tmp_path / "no", {})
    with pytest.raises(MissingDataError, match="--train_file"):
        check_sources([], None, {"train_file": tmp_path / "no.jsonl"})


def test_whole_groups_are_held_out():
    groups = [index // 10 for index in range(200)]
    kept, held_out = split_by_group([SimpleNamespace(group=group) for group in groups], groups, seed=3)
    assert len(held_out) == 10
    assert not {item.group for item in kept} & {item.group for item in held_out}


def test_a_single_group_is_not_parted():
    kept, held_out = split_by_group([SimpleNamespace()] * 5, ["a"] * 5, seed=0)
    assert (len(kept), len(held_out)) == (5, 0)


def test_a_limit_draws_by_seed():
    assert draw(range(100), 5, 0) == draw(range(100), 5, 0) != draw(range(100), 5, 1)
    assert draw(range(3), 5, 0) == [0, 1, 2]
