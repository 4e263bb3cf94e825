from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from training import study as study_module
from training.arguments import TrainingFlags
from training.study import finished_result, main, run_job, run_jobs, study, write_whole
from training.study_plan import Job, StudyFlags, plan_study, training_values

from .conftest import TINY_NEO, text_pairs, write_rows


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def flags(tmp_path, model_file) -> StudyFlags:
    own = write_rows(tmp_path / "own.jsonl", text_pairs(60))
    return StudyFlags(
        output_dir=tmp_path / "study",
        variants=("layers", "lora"),
        datasets=(),
        train_file=own,
        model_config=model_file,
        max_steps=3,
        batch_rows=200,
        warmup_steps=1,
        calibration_prompts=2,
        max_new_tokens=8,
        adapter_examples=20,
        vocab_size=300,
        bf16=False,
    )


class InThisProcess:
    """Runs a job at once instead of in a process of its own."""

    ran: list[str] = []

    def __init__(self, output_dir: Path, job: Job, at_once: int):
        self.ran.append(job.name)
        folder = output_dir / job.name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "job.json", json.dumps(vars(job)))
        run_job(folder / "job.json")

    def poll(self) -> int:
        return 0

    def terminate(self) -> None:
        raise AssertionError("nothing runs")


@pytest.fixture
def here(monkeypatch) -> list[str]:
    monkeypatch.setattr(study_module, "start", InThisProcess)
    monkeypatch.setattr(study_module, "POLL_S", 0.0)
    monkeypatch.setattr(InThisProcess, "ran", [])
    return InThisProcess.ran


def test_a_study_measures_every_variant_and_does_none_twice(flags, here):
    assert study(flags) == 0
    assert here.index("base") < here.index("targets") < here.index("adapter_lora0_own")
    document = json.loads((flags.output_dir / "study.json").read_text())
    assert document["groups"]["layers"] == ["gamma2_layers1_transition4", "gamma2_layers2_transition4"]
    assert [entry["name"] for entry in document["variants"]] == [
        *document["groups"]["layers"],
        *document["groups"]["lora"],
    ]
    for entry in document["variants"]:
        assert entry["steps"] == 3
        assert set(entry["sets"]["train_file"]["acceptance_length"]) >= {"8", "16", "32", "64"}
        assert 1 <= entry["expected_with_own_tree"]["train_file"]["64"] <= 3
        assert entry["hardware"]["dtype"] == "float32"
        assert len(entry["rank_accuracy"]) == 2
    assert "## lora" in (flags.output_dir / "study.md").read_text()
    del here[:]
    (flags.output_dir / "adapter_lora8_own" / "result.json").unlink()
    assert study(flags) == 0
    assert here == ["adapter_lora8_own"]


def test_adapters_share_a_stock_base_and_its_texts(flags, here):
    assert study(replace(flags, variants=("lora",))) == 0
    base = json.loads((flags.output_dir / "base" / "stock" / "config.json").read_text())
    assert base["model_type"] == "gpt_neo"
    assert len(list((flags.output_dir / "targets" / "texts").glob("*.jsonl"))) == 2  # train and held out
    assert not (flags.output_dir / "adapter_lora8_own" / "targets").exists()
    kept = json.loads((flags.output_dir / "adapter_lora64_own" / "config.json").read_text())
    assert (kept["lora_rank"], kept["streams"], kept["stream_layers"]) == (64, 2, 1)


def test_other_settings_are_trained_again(flags, here):
    small = replace(flags, variants=("layers",))
    assert study(small) == 0
    job = plan_study(small).jobs[0]
    assert finished_result(flags.output_dir, job) is not None
    assert finished_result(flags.output_dir, plan_study(replace(small, max_steps=4)).jobs[0]) is None


def test_variants_of_two_groups_are_trained_once(flags):
    plan = plan_study(replace(flags, variants=("gamma", "layers", "transition")))
    names = [job.name for job in plan.jobs]
    assert len(names) == len(set(names))
    assert "gamma4_layers1_transition4" in names
    assert plan.groups["transition"][1] == "gamma2_layers1_transition16"


def test_every_job_has_flags_that_training_takes(flags):
    for job in plan_study(flags).jobs:
        values = training_values(json.loads(json.dumps(job.settings)))
        made = TrainingFlags(**values)
        assert made.output_dir == flags.output_dir / job.name
        assert made.data_weights == ()


WORDS = ["--datasets", "none", "--variants", "layers,lora", "--no-bf16", "--max_steps", "3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to train on: give --datasets, --train_file"),
        (["--train_file", "nowhere.jsonl"], "--train_file nowhere.jsonl: no such file"),
        (["--datasets", "foo"], "--datasets 'foo' cannot be trained on"),
        (["--datasets", "spider", "--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["--train_file", "own", "--max_new_tokens", "0"], "--max_new_tokens must be 1 or more, got 0"),
        (["--train_file", "own", "--learning_rate", "-1"], "--learning_rate must be above 0, got -1.0"),
        (["--train_file", "own", "--vocab_size", "5"], "--vocab_size must be 257 or more, got 5"),
    ],
)
def test_mistakes_that_jobs_would_find_are_told_before_them(flags, here, words, said, caplog):
    flags.output_dir.mkdir()
    (flags.output_dir / "study.json").write_text("earlier")
    words = [str(flags.train_file) if word == "own" else word for word in words]
    common = ["--output_dir", str(flags.output_dir), "--model_config", str(flags.model_config)]
    assert main([*common, *WORDS, *words]) == 2
    assert said in caplog.messages[-1]
    assert here == []
    assert [path.name for path in flags.output_dir.iterdir()] == ["study.json"]
    assert (flags.output_dir / "study.json").read_text() == "earlier"


def test_an_output_folder_that_cannot_be_is_one_line(flags, here, caplog, monkeypatch):
    words = [*WORDS, "--train_file", str(flags.train_file), "--model_config", str(flags.model_config)]
    assert main([*words, "--output_dir", str(flags.train_file)]) == 2
    assert "own.jsonl cannot be a folder, a file is in the way" in caplog.messages[-1]

    def refuse(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    assert main([*words, "--output_dir", str(flags.output_dir)]) == 1
    assert "study cannot be made (Permission denied); choose another folder" in caplog.messages[-1]
    assert here == []


class Fake:
    """A process that ends after some polls."""

    alive = 0
    most = 0

    def __init__(self, polls: int, code: int = 0):
        self.polls, self.code, self.stopped = polls, code, False
        Fake.alive += 1
        Fake.most = max(Fake.most, Fake.alive)

    def poll(self) -> int | None:
        self.polls -= 1
        if self.polls > 0:
            return None
        Fake.alive -= 1
        return self.code

    def terminate(self) -> None:
        self.stopped = True


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(study_module, "POLL_S", 0.0)
    monkeypatch.setattr(Fake, "alive", 0)
    monkeypatch.setattr(Fake, "most", 0)


def test_so_many_jobs_run_at_once(no_waiting):
    jobs = [Job(str(number), "variant", {}) for number in range(7)]
    assert run_jobs(jobs, 3, lambda job: Fake(polls=3)) == {}
    assert Fake.most == 3


def test_a_failed_job_takes_only_what_needs_it(no_waiting):
    jobs = [
        Job("base", "base", {}),
        Job("targets", "targets", {}, "base"),
        Job("adapter", "variant", {}, "targets"),
        Job("other", "variant", {}),
    ]
    started = []

    def launch(job):
        started.append(job.name)
        return Fake(polls=2, code=1 if job.name == "base" else 0)

    failures = run_jobs(jobs, 4, launch)
    assert started == ["base", "other"]
    assert set(failures) == {"base", "targets", "adapter"}
    assert failures["adapter"] == "needs targets, which failed"


def test_jobs_are_stopped_with_the_study(no_waiting):
    made = []

    def launch(job):
        if made:
            raise KeyboardInterrupt
        made.append(Fake(polls=99))
        return made[0]

    with pytest.raises(KeyboardInterrupt):
        run_jobs([Job("a", "variant", {}), Job("b", "variant", {})], 2, launch)
    assert made[0].stopped


@pytest.mark.slow  # two processes that import torch
def test_a_failure_is_told_with_its_last_words(flags, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({**TINY_NEO, "num_heads": 5}))
    assert study(replace(flags, variants=("layers",), model_config=broken, jobs=2)) == 1
    document = json.loads((flags.output_dir / "study.json").read_text())
    assert document["variants"] == []
    assert "num_heads" in document["failures"]["gamma2_layers1_transition4"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output_dir", "x", "--variants", "gama"], "gama"),
        (["--output_dir", "x", "--minutes", "0"], "--minutes"),
        (["--output_dir", "x", "--job", "1"], "--jobs"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
