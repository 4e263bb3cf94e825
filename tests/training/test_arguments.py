from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from training.arguments import TrainingFlags, command_of, parse_flags

ROOT = Path(__file__).resolve().parents[2]
SCRATCH = ["--mode", "scratch", "--output_dir", "runs/x", "--model_config", "configs/spec_stream_9m.json"]


def error_of(words, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_flags(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_flags_become_fields():
    flags = parse_flags(
        [*SCRATCH, "--datasets", "spider,e2e_nlg", "--bf16", "--stream_loss_weight", "0.5,0.1"]
    )
    assert flags.datasets == ("spider", "e2e_nlg")
    assert flags.stream_loss_weight == (0.5, 0.1)
    assert flags.bf16 and flags.output_dir == Path("runs/x")
    assert flags.effective_prompt_loss_weight == 0.3
    assert parse_flags([*SCRATCH, "--datasets", "none", "--train_file", "x"]).datasets == ()


def test_an_unknown_flag_names_the_nearest(capsys):
    assert "--learning_rate" in error_of([*SCRATCH, "--learning_rat", "1"], capsys)
    assert "--max_steps" in error_of([*SCRATCH, "--max-steps=3"], capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "scratch", "--output_dir", "x"], "--model_config"),
        (["--mode", "adapter", "--output_dir", "x"], "--model_name_or_path"),
        (["--mode", "none", "--output_dir", "x"], "--mode"),
        ([*SCRATCH, "--max_steps", "0"], "--max_steps must be 1 or more, got 0"),
        ([*SCRATCH, "--limit", "0"], "--limit must be 1 or more, got 0"),
        ([*SCRATCH, "--learning_rate", "nan"], "--learning_rate must be above 0"),
        ([*SCRATCH, "--max_train_minutes", "-1"], "--max_train_minutes must be above 0"),
        ([*SCRATCH, "--stream_loss_weight=-1"], "--stream_loss_weight"),
        ([*SCRATCH, "--data_weights", "spyder=2"], "spyder=2"),
        ([*SCRATCH, "--data_weights", "spider"], "spider=2"),
        ([*SCRATCH, "--datasets", "none"], "nothing to train on"),
        ([*SCRATCH, "--model_name_or_path", "x"], "--mode joint"),
        ([*SCRATCH, "--bf16_weights", "--bf16"], "--bf16_weights does not go with --bf16"),
        (
            ["--mode", "adapter", "--output_dir", "x", "--model_name_or_path", "x", "--bf16_weights"],
            "--mode adapter",
        ),
        ([*SCRATCH, "--targets", "own"], "--targets own"),
        ([*SCRATCH, "--targets_dir", "x"], "--targets_dir"),
        ([*SCRATCH, "--batch_rows", "0"], "--batch_rows must be 1 or more"),
        ([*SCRATCH, "--adam_beta2", "1"], "--adam_beta2 must lie between 0 and 1"),
    ],
)
def test_mistakes_are_told_in_one_line(words, said, capsys):
    error = error_of(words, capsys)
    assert said in error
    assert error.count("\n") == 1


def test_set_weights():
    flags = parse_flags([*SCRATCH, "--data_weights", "spider=2,e2e_nlg=0.5"])
    assert flags.set_weights == {"spider": 2.0, "e2e_nlg": 0.5}


def test_the_command_repeats_the_run():
    flags = parse_flags([*SCRATCH, "--bf16", "--data_dir", "/some/where/data", "--streams", "3"])
    command = command_of(flags)
    assert command.startswith("python train_spec_stream.py --mode scratch --output_dir runs/x")
    assert "/some/where" not in command
    assert parse_flags(command.split()[2:]) == TrainingFlags(
        mode="scratch",
        output_dir=Path("runs/x"),
        model_config=Path("configs/spec_stream_9m.json"),
        bf16=True,
        data_dir=Path("data"),
        streams=3,
    )


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--mode", "scratch"], 2),
        ([*SCRATCH, "--data_dir", "no/such/folder"], 2),
        (["--mode", "adapter", "--output_dir", "x", "--model_name_or_path", "./none"], 2),
        (["--mode", "scratch", "--output_dir", "x", "--model_config", "no.json"], 2),
    ],
)
def test_mistakes_need_no_torch(words, code):
    program = (
        "import sys, train_spec_stream\n"
        "try: code = train_spec_stream.main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
