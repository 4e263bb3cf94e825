"""`tune_spec_stream.py`: its table, what it saves and what it refuses."""

import json

import pytest
import torch

import tune_spec_stream
from huggingface.transformers.generation import draft_settings, tree_tuning
from huggingface.transformers.models.spec_stream import load_streaming, stock_class
from models import Limits, fold
from models.loading import load
from tests.models.conftest import save_tokenizer, tiny_config

ACCURACY = [[0.9, 0.05], [0.8, 0.1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny checkpoint with streams and calibrated accuracies."""
    directory = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    config = tiny_config("gpt_neo")
    stock_class(config)(config).save_pretrained(directory / "stock")
    model = load_streaming(str(directory / "stock"), stream_fields={"streams": 2, "stream_layers": 1})
    draft_settings.update_settings(model, rank_accuracy=ACCURACY)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def checkpoint(trained, tmp_path):
    for file in trained.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def costs(monkeypatch):
    """Steps cost what the test says: nodes -> seconds."""
    table = {1: 1.0, 2: 1.1, 4: 2.0}

    def measured(model, plans, context, batch):
        return {plan: table[plan.shape.nodes] for plan in plans}

    monkeypatch.setattr(tree_tuning, "eager_step_seconds", measured)
    return table


@pytest.fixture
def captured(monkeypatch):
    """Steps are captured and cost what the test says of nodes, streams, beam and batch."""
    told = [lambda nodes, streams, beam, batch: 1.0]

    def measured(model, plans, context, batch):
        return {plan: told[0](plan.shape.nodes, plan.shape.streams, plan.beam or 1, batch) for plan in plans}

    monkeypatch.setattr(tree_tuning, "captures_steps", lambda model: True)
    monkeypatch.setattr(tree_tuning, "captured_step_seconds", measured)
    return told


def tune(checkpoint, *flags):
    return tune_spec_stream.main(["--model_name_or_path", str(checkpoint), "--device", "cpu", *flags])


def saved(checkpoint):
    return json.loads((checkpoint / "generation_config.json").read_text())["spec_stream"]


def test_chosen_size_is_printed_saved_and_used(checkpoint, costs, capsys):
    before = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert tune(checkpoint, "--sizes", "4,1,2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "4"]
    assert [line for line in lines if "<- chosen" in line] == [lines[3]]
    assert lines[1].split() == [
        "nodes",
        "streams",
        "carriers",
        "beam",
        "step",
        "ms",
        "tokens/step",
        "tokens/s",
    ]
    assert lines[3].split()[:7] == ["2", "1", "2", "-", "1100.000", "1.90", "1.7"]
    setting = f"cpu, {torch.get_num_threads()} threads, float32"
    assert saved(checkpoint) == {"rank_accuracy": ACCURACY, "draft_nodes": {setting: 2}}
    after = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} == {"generation_config.json"}
    model = load(fold("spec_stream"), checkpoint, "cpu")
    model.generate(["a"], Limits(max_new_tokens=4))
    assert (model.draft_nodes, model.draft_source) == (2, "tuned")


def test_settings_stand_side_by_side(checkpoint, costs):
    assert tune(checkpoint, "--sizes", "2") == 0
    assert tune(checkpoint, "--sizes=1", "--batch-size=3", "--dtype", "bfloat16") == 0
    threads = torch.get_num_threads()
    assert saved(checkpoint)["draft_nodes"] == {
        f"cpu, {threads} threads, float32": 2,
        f"cpu, {threads} threads, bfloat16, batch 4": 1,
    }


def test_captured_candidates_are_listed_and_each_batch_size_is_saved(checkpoint, captured, capsys):
    def cost(nodes, streams, beam, batch):
        if batch == 4:
            return float(nodes)
        return {(1, 0, 1): 1.0, (3, 2, 1): 1.2, (4, 2, 8): 1.1}.get((nodes, streams, beam), 9.0)

    captured[0] = cost
    assert tune(checkpoint, "--sizes", "4", "--batch_size", "3,1,4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[2:6]] == [
        ["1", "0", "1", "-"], ["3", "1", "3", "8"], ["3", "2", "3", "1"], ["4", "2", "4", "8"]
    ]  # fmt: skip
    assert [line.split()[:6] for line in lines if "<- chosen" in line] == [
        ["4", "2", "4", "8", "1100.000", "2.71"], ["1", "0", "1", "-", "1000.000", "1.00"]
    ]  # fmt: skip
    assert sum("saved to" in line for line in lines) == 2
    assert sum("nothing is drafted" in line for line in lines) == 1
    assert float(next(line for line in lines[8:] if "chosen" in line).split()[6]) == 4.0  # of all four
    setting = f"cpu, {torch.get_num_threads()} threads, float32"
    assert saved(checkpoint)["draft_nodes"] == {
        setting: {"nodes": 4, "streams": 2, "beam": 8},
        f"{setting}, batch 4": {"nodes": 1, "streams": 0, "beam": 1},
    }
    model = load(fold("spec_stream"), checkpoint, "cpu")
    for prompts, nodes in ((["a"], 4), (["a", "b", "c"], 1)):
        model.generate(prompts, Limits(max_new_tokens=4))
        assert (model.draft_nodes, model.draft_source) == (nodes, "tuned")


def test_what_was_tuned_before_an_error_is_saved(checkpoint, monkeypatch, capsys):
    def measured(model, plans, context, batch):
        if batch > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return dict.fromkeys(plans, 1.0)

    monkeypatch.setattr(tree_tuning, "eager_step_seconds", measured)
    assert tune(checkpoint, "--sizes", "2", "--batch_size", "1,8") == 1
    error = capsys.readouterr().err
    assert "plain decoding of 8 sequences" in error
    assert error.count("\n") == 1
    assert list(saved(checkpoint)["draft_nodes"].values()) == [2]


@pytest.mark.parametrize("flag", ["--no-save", "--no_save"])
def test_no_save_leaves_the_checkpoint_alone(checkpoint, costs, flag):
    assert tune(checkpoint, "--sizes", "1,2", flag) == 0
    assert "draft_nodes" not in saved(checkpoint)


def test_real_steps(checkpoint, capsys):
    assert tune(checkpoint, "--sizes", "1,3", "--context", "1000") == 0
    assert "steps after 90 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "1,x"], "--sizes got 'x', expected whole numbers of 1 or more"),
        (["--sizes", "0"], "--sizes got '0'"),
        (["--batch_size", "0"], "--batch_size got '0'"),
        (["--batch_size", "1,,2"], "--batch_size got ''"),
        (["--context", "many"], "--context got 'many'"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--size", "3"], "unknown argument '--size': did you mean '--sizes'?"),
        (["--device", "foo"], "--device got foo, expected auto, cpu, cuda or cuda:N"),
        (["--model_name_or_path", "./nowhere"], "no such directory"),
        (["--model_name_or_path", "owner/name"], "is a hub id: give a local copy, or add --no-save"),
    ],
)
def test_wrong_arguments_are_one_line(flags, message, capsys):
    assert tune_spec_stream.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_checkpoint_without_streams_is_refused(trained, capsys):
    assert tune(trained / "stock") == 2
    assert "train_spec_stream.py --mode adapter" in capsys.readouterr().err


def test_checkpoint_that_cannot_keep_the_choice_is_refused(checkpoint, capsys):
    (checkpoint / "generation_config.json").unlink()
    assert tune(checkpoint) == 2
    assert "add --no-save" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rank_accuracy": "x"},
            "spec_stream.rank_accuracy must be a list of numbers for each stream, got 'x'",
        ),
        ({"rank_accuracy": [0.9, 0.1]}, "spec_stream.rank_accuracy must be a list of numbers"),
        (
            {"rank_accuracy": ACCURACY, "draft_nodes": "x"},
            "spec_stream.draft_nodes must be an object, got 'x'",
        ),
        ("x", "spec_stream must be an object, got 'x'"),
    ],
)
def test_damaged_settings_are_one_line(checkpoint, costs, settings, message, capsys):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"spec_stream": settings}))
    before = path.read_text()
    assert tune(checkpoint, "--sizes", "2") == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert path.read_text() == before


def test_damaged_weights_end_with_one(checkpoint, capsys):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert tune(checkpoint) == 1
    assert "corrupt" in capsys.readouterr().err
