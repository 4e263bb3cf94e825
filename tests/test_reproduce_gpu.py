"""`configs/reproduce_gpu.sh` needs a GPU; that its commands are ones the programs take does not."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from benchmark import flags, quantised_quality
from training.arguments import parse_flags

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train_spec_stream.py": parse_flags,
    "dataset_tps.py": flags.parse,
    "benchmark.quantised_quality": quantised_quality.parse,
}
OTHERS = {"benchmark.step_times", "benchmark.product_times"}


def script(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "configs" / "reproduce_gpu.sh", *words],
        env={**os.environ, **environment},
        text=True,
        capture_output=True,
        check=False,
    )


def commands(folder: Path, *steps: str) -> list[list[str]]:
    told = script(str(folder / "data"), str(folder / "out"), *steps, DRY="1")
    assert told.returncode == 0, told.stderr
    return [shlex.split(line) for line in told.stdout.splitlines()]


def test_every_command_is_one_that_its_program_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = set()
    for python, *words in commands(tmp_path):
        program, *rest = words[1:] if words[0] == "-m" else words
        assert (python, program in PROGRAMS.keys() | OTHERS) == ("python", True)
        if program in PROGRAMS:
            PROGRAMS[program](rest)
        seen.add(program)
    assert seen == PROGRAMS.keys() | OTHERS


def test_a_step_alone_and_a_model_that_is_there(tmp_path):
    assert len(commands(tmp_path, "train_125m")) == 2
    (tmp_path / "out" / "base_125m").mkdir(parents=True)
    (tmp_path / "out" / "base_125m" / "generation_config.json").write_text("{}")
    assert len(commands(tmp_path, "train_125m")) == 2  # cut before its weights were written
    (tmp_path / "out" / "base_125m" / "README.md").write_text("")
    (left,) = commands(tmp_path, "train_125m")
    assert str(tmp_path / "out" / "gpt_neo_125m") in left


def test_mistakes_are_told(tmp_path):
    told = script(str(tmp_path), str(tmp_path), "steps", "train_9b", DRY="1")
    assert (told.returncode, told.stdout) == (2, "")  # names are checked before the first step
    assert "unknown step 'train_9b'; choose from steps products" in told.stderr
    told = script(str(tmp_path))
    assert (told.returncode, "DATA OUT [STEP ...]" in told.stderr) == (2, True)
