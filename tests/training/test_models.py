"""Which streams a run's model gets: from flags, file and checkpoint, and that a resumed run must have the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train_spec_stream
from training import run as run_module
from training.arguments import TrainingFlags
from training.models import check_resumed, planned_fields
from training.run import run

from .conftest import make_model

SHORT = {"max_steps": 1, "warmup_steps": 0, "eval_steps": 0, "save_steps": 0, "calibration_prompts": 0}


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def scratch(tmp_path, own_file, model_file):
    def make(**changes) -> TrainingFlags:
        values = {"train_file": own_file, "model_config": model_file, "vocab_size": 300, **SHORT, **changes}
        return TrainingFlags(mode="scratch", output_dir=tmp_path / "out", datasets=(), **values)

    return make


@pytest.fixture
def checkpoint(tmp_path, tokenizer) -> Path:
    """A checkpoint with two streams."""
    folder = tmp_path / "checkpoint"
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def joint(folder: Path, checkpoint: Path, own_file: Path, **changes) -> TrainingFlags:
    values = {"train_file": own_file, "model_name_or_path": str(checkpoint), **SHORT, **changes}
    return TrainingFlags(mode="joint", output_dir=folder, datasets=(), **values)


def test_flags_come_before_the_model_file(scratch):
    assert planned_fields(scratch())["streams"] == 2
    assert planned_fields(scratch(streams=3))["streams"] == 3


@pytest.mark.parametrize("changes", [{"streams": 3}, {"lora_rank": 4}])
def test_other_streams_replace_the_checkpoints(tmp_path, checkpoint, own_file, changes):
    folder = run(joint(tmp_path / "out", checkpoint, own_file, **changes))
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in changes} == changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transition_rank": 0}, "--transition_rank 4, not 0"),
        ({"streams": 3, "lora_rank": 2}, "--streams 2, not 3, --lora_rank 0, not 2"),
    ],
)
def test_a_checkpoint_of_other_streams_is_not_resumed(tmp_path, checkpoint, own_file, changes, said):
    check_resumed(joint(tmp_path / "out", checkpoint, own_file), checkpoint)
    with pytest.raises(ValueError, match=said):
        check_resumed(joint(tmp_path / "out", checkpoint, own_file, **changes), checkpoint)


def test_other_flags_on_resuming_are_one_line_before_data_are_read(scratch, monkeypatch, capsys):
    flags = scratch(streams=3, save_steps=1)
    run(flags)
    monkeypatch.setattr(run_module, "load", lambda flags: pytest.fail("data were read"))
    words = [
        "--mode",
        "scratch",
        "--output_dir",
        str(flags.output_dir),
        "--datasets",
        "none",
        "--max_steps",
        "2",
    ]
    words += ["--train_file", str(flags.train_file), "--model_config", str(flags.model_config)]
    words += ["--vocab_size", "300", "--resume_from_checkpoint", "latest"]
    for more, said in (
        (["--streams", "4"], "--streams 3, not 4"),
        ([], "--streams 3, not 2"),
        (["--streams", "3", "--lora_rank", "2"], "--lora_rank 0, not 2"),
    ):
        assert train_spec_stream.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
