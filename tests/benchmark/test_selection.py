"""Which techniques a run has: precision plans for another model or changed since it began, checkpoints in AWQ's format."""

import json

import pytest

from benchmark.config import RunConfig
from benchmark.errors import UsageError
from benchmark.selection import select, unused_flags
from tests.benchmark.bench import Bench

PLAN = {"default": {"bits": 4, "group_size": 32}, "modules": {}}


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    return Bench(tmp_path, monkeypatch, capsys)


@pytest.fixture
def plan(tmp_path):
    """Writes a plan's file with these modules and returns its path."""

    def write(**modules):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps(PLAN | {"modules": modules}))
        return file

    return write


def test_a_plan_reaches_the_workers(bench, plan):
    assert bench.run("--model_type", "naive,int4", "--precision_plan", str(plan())) == 0
    saved = json.loads((bench.folder / "results" / "run" / "config.json").read_text())
    weights = saved["techniques"]["int4"]["recipe"]["weights"]
    assert json.loads(weights.removeprefix("int4-plan:")) == {
        "default": {"bits": 4, "group_size": 32, "zero_point": False}, "modules": {}
    }  # fmt: skip


def test_a_plan_for_another_model_writes_nothing(bench, plan):
    file = plan(**{"transformer.h.77.mlp.c_fc": {"bits": 8}})
    assert bench.run("--model_type", "naive,int4", "--precision_plan", str(file)) == 2
    assert "names transformer.h.77.mlp.c_fc" in bench.err
    assert not (bench.folder / "results").exists()


def test_a_plan_that_is_none_writes_nothing(bench, plan):
    assert bench.run("--model_type", "naive,int4", "--precision_plan", str(plan(a={"bits": 2}))) == 2
    assert "module 'a' has 2 bits" in bench.err
    assert not (bench.folder / "results").exists()


@pytest.mark.parametrize("model_type", ["spec_stream", "naive,int4"])
@pytest.mark.parametrize("weights", [(), ("--random_weights",)])
def test_a_plan_that_is_not_there_is_one_line(bench, model_type, weights):
    assert bench.run("--model_type", model_type, "--precision_plan", "/none", *weights) == 2
    assert "--precision_plan /none cannot be read" in bench.err
    assert len(bench.err.splitlines()) == 1
    assert not (bench.folder / "results").exists()


def test_a_plan_that_changed_is_refused_also_by_a_finished_run(bench, plan):
    words = ("--model_type", "naive,int4", "--precision_plan", str(plan()))
    assert bench.run(*words) == 0
    assert bench.run(*words) == 0
    plan_file = words[-1]
    with open(plan_file, "w") as file:
        json.dump(PLAN | {"default": {"bits": 4, "group_size": 64}}, file)
    assert bench.run(*words) == 2
    assert "how int4 would store weights is not as when this run began" in bench.err
    assert bench.run(*words, "--overwrite") == 0


def test_a_checkpoint_in_awqs_format_is_for_awq():
    config = RunConfig(model_type=("naive", "int4", "awq"))
    chosen = select(config, {"device": "cpu"}, {}, quantized="awq")
    assert list(chosen.contenders) == ["awq"]
    assert all("use awq" in reason for reason in chosen.skipped.values())
    with pytest.raises(UsageError, match="int4 cannot run here: .*use awq"):
        select(RunConfig(model_type=("int4",)), {"device": "cpu"}, {}, quantized="awq")
    with pytest.raises(UsageError, match="awq cannot run here: .*--calibration_text"):
        select(RunConfig(model_type=("awq",)), {"device": "cpu"}, {})


def test_flags_of_techniques_that_are_not_in_the_run_are_told():
    options = {"technique_options": {"group_size": 32}, "assistant_model": "small"}
    assert unused_flags(RunConfig(model_type=("spec_stream",), **options)) == [
        "--group_size",
        "--assistant_model",
    ]
    assert unused_flags(RunConfig(model_type=("naive", "int4+spec_stream"), **options)) == [
        "--assistant_model"
    ]
    assert unused_flags(RunConfig(model_type=("naive", "int4", "assisted"), **options)) == []
