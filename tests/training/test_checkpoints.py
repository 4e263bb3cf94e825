from __future__ import annotations

import logging

import pytest

from training.checkpoints import (
    check_output_dir,
    choose_checkpoint,
    is_complete,
    last_complete,
    mark_complete,
)


@pytest.fixture
def output_dir(tmp_path):
    for step in (2, 10, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * step)
        (folder / "trainer_state.json").write_text("{}")
        mark_complete(folder)
    return tmp_path


def test_the_newest_by_number_is_resumed(output_dir):
    assert choose_checkpoint("latest", output_dir).name == "checkpoint-30"
    assert last_complete(output_dir).name == "checkpoint-30"


@pytest.mark.parametrize("damage", ["truncated", "missing", "unmarked"])
def test_a_torn_checkpoint_gives_way_to_the_one_before(output_dir, caplog, damage):
    torn = output_dir / "checkpoint-30"
    if damage == "truncated":
        (torn / "model.safetensors").write_bytes(b"x" * 7)
    elif damage == "missing":
        (torn / "trainer_state.json").unlink()
    else:
        (torn / "complete.json").unlink()
    assert not is_complete(torn)
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint("latest", output_dir).name == "checkpoint-10"
        assert choose_checkpoint(str(torn), output_dir).name == "checkpoint-10"
    assert "checkpoint-30 is not whole" in caplog.text


def test_an_older_checkpoint_can_be_asked_for(output_dir):
    assert choose_checkpoint(str(output_dir / "checkpoint-2"), output_dir).name == "checkpoint-2"


def test_nothing_to_resume_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no whole checkpoint"):
        choose_checkpoint("latest", tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        choose_checkpoint(str(tmp_path / "no"), tmp_path)


def test_an_earlier_runs_folder_is_not_mixed_with_a_new_run(output_dir, tmp_path):
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        check_output_dir(output_dir, resumes=False)
    check_output_dir(output_dir, resumes=True)
    check_output_dir(tmp_path / "new" / "run", resumes=False)
    assert (tmp_path / "new" / "run").is_dir()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_the_way_of_the_folder_is_named(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"--output_dir .*{name} cannot be a folder.*choose another folder"):
        check_output_dir(tmp_path / name, resumes=False)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(OSError, match=r"--output_dir .*new cannot be made \(Permission denied\); choose"):
        check_output_dir(tmp_path / "new", resumes=False)
