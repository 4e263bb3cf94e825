"""Which streams a run's model gets: from flags, file and checkpoint, and that a resumed run must have the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_spec_stream
from huggingface.transformers.models.spec_stream.configuration_spec_stream import LEAST_DRAFT_VOCAB
from training import arguments
from training import run as run_module
from training.arguments import TrainingFlags
from training.models import check_resumed, planned_fields, read_model_file
from training.run import run

from .conftest import TINY_NEO, make_model

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
    """A checkpoint whose streams draft 40 tokens."""
    folder = tmp_path / "checkpoint"
    model = make_model(tokenizer)
    model.set_draft_vocab(torch.arange(40))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def joint(folder: Path, checkpoint: Path, own_file: Path, **changes) -> TrainingFlags:
    values = {"train_file": own_file, "model_name_or_path": str(checkpoint), **SHORT, **changes}
    return TrainingFlags(mode="joint", output_dir=folder, datasets=(), **values)


def test_the_least_number_of_drafted_tokens_is_the_models():
    assert arguments.LEAST_DRAFT_VOCAB == LEAST_DRAFT_VOCAB


def test_a_model_file_may_limit_what_is_drafted(scratch, model_file):
    model_file.write_text(json.dumps({**TINY_NEO, "draft_vocab_size": 50}))
    assert planned_fields(scratch())["draft_vocab_size"] == 50
    assert planned_fields(scratch(draft_vocab_size=60))["draft_vocab_size"] == 60
    folder = run(scratch())
    tokens = load_file(folder / "model.safetensors")["streams.draft_vocab"]
    assert len(tokens) == 50
    assert tokens.max() > 50  # chosen from the data
    assert json.loads((folder / "config.json").read_text())["draft_vocab_size"] == 50


@pytest.mark.parametrize("size", [5, -1, "50", None])
def test_a_model_files_number_is_checked_before_data_are_read(model_file, size):
    model_file.write_text(json.dumps({**TINY_NEO, "draft_vocab_size": size}))
    with pytest.raises(ValueError, match=r"tiny\.json: draft_vocab_size must be 0 or 16 or more"):
        read_model_file(model_file)


@pytest.mark.parametrize("changes", [{"streams": 3}, {"lora_rank": 4}])
def test_other_streams_draft_as_many_tokens(tmp_path, checkpoint, own_file, changes):
    folder = run(joint(tmp_path / "out", checkpoint, own_file, **changes))
    tokens = load_file(folder / "model.safetensors")["streams.draft_vocab"]
    assert len(tokens) == 40
    assert tokens.tolist() != list(range(40))  # chosen anew
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in changes} == changes


def test_other_streams_can_draft_all_tokens(tmp_path, checkpoint, own_file):
    folder = run(joint(tmp_path / "out", checkpoint, own_file, streams=3, draft_vocab_size=0))
    assert "streams.draft_vocab" not in load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"draft_vocab_size": 50}, "--draft_vocab_size 40, not 50"),
        ({"draft_vocab_size": 0}, "--draft_vocab_size 40, not 0"),
        ({"streams": 3, "lora_rank": 2}, "--streams 2, not 3, --lora_rank 0, not 2"),
    ],
)
def test_a_checkpoint_of_other_streams_is_not_resumed(tmp_path, checkpoint, own_file, changes, said):
    check_resumed(joint(tmp_path / "out", checkpoint, own_file), checkpoint)
    with pytest.raises(ValueError, match=said):
        check_resumed(joint(tmp_path / "out", checkpoint, own_file, **changes), checkpoint)


def test_other_flags_on_resuming_are_one_line_before_data_are_read(scratch, monkeypatch, capsys):
    flags = scratch(draft_vocab_size=50, save_steps=1)
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
        (["--draft_vocab_size", "60"], "--draft_vocab_size 50, not 60"),
        ([], "--draft_vocab_size 50, not 0"),
        (["--draft_vocab_size", "50", "--streams", "3"], "--streams 2, not 3"),
    ):
        assert train_spec_stream.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
