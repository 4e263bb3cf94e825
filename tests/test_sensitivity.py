"""`sensitivity.py`: what it writes, that it goes on where it stopped, and what it refuses without writing."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sensitivity
from benchmark import figures
from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from huggingface.transformers.models.spec_stream import stock_class
from models import Machine, fold
from models.loading import load
from precision import study
from tests.models.conftest import save_tokenizer, tiny_config

TEXT = "name[The Vaults], eatType[pub], priceRange[more than 30]. " * 12
FILES = ["config.json", "figures", "plan.json", "plans.jsonl", "report.md", "sensitivity.csv", "units.jsonl"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint of Llama's architecture."""
    directory = tmp_path_factory.mktemp("saved")
    torch.manual_seed(1)
    config = tiny_config("llama")
    # Wide enough that 4 bits take fewer bytes than 8: runs of 128 inputs are filled up.
    config.hidden_size = config.intermediate_size = 128
    stock_class(config)(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def call(checkpoint, tmp_path):
    """Runs the program on the tiny checkpoint and a text file; the folder it writes is `out`."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = {
        "--model_name_or_path": checkpoint, "--text": text, "--output_dir": tmp_path / "out", "--window": 16,
        "--tokens": 40, "--group_size": 32, "--device": "cpu",
    }  # fmt: skip

    def run(*words, **flags):
        given = common | {f"--{name}": value for name, value in flags.items()}
        return sensitivity.main([str(part) for pair in given.items() for part in pair] + list(words))

    return run


@pytest.fixture
def measured(monkeypatch):
    """Names of the units that were measured, in order."""
    names, real = [], study.measure_unit

    def counting(model, modules, unit, *rest):
        names.append(unit.name)
        return real(model, modules, unit, *rest)

    monkeypatch.setattr(study, "measure_unit", counting)
    return names


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_layer_is_measured_and_the_plan_is_one_that_int4_takes(call, tmp_path, checkpoint, capsys):
    assert call(budget=1.4) == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert sorted(path.name for path in (out / "figures").iterdir()) == ["plans.png", "sensitivity.png"]
    assert capsys.readouterr().out.splitlines() == [str(out / "report.md"), str(out / "plan.json")]
    rows = lines(out / "units.jsonl")
    assert len(rows) == 14
    with (out / "sensitivity.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["unit"] for row in table] == [row["unit"] for row in rows]
    assert float(table[3]["nll_change"]) == rows[3]["nll_change"]
    plan = json.loads((out / "plan.json").read_text())
    assert plan["modules"]
    assert plan["bytes"] <= 1.4 * plan["default_bytes"]
    model = load(fold("int4", {"precision_plan": str(out / "plan.json")}, Machine()), checkpoint, "cpu").model
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    stored = sum(tensor.nbytes for module in packed.values() for tensor in module.packed.tensors().values())
    plain = [name for name, value in plan["modules"].items() if value == "plain"]
    stored += sum(2 * model.get_submodule(name).weight.numel() for name in plain)
    assert stored == plan["bytes"]
    for layer in model.model.layers:
        assert (
            len(
                {
                    getattr(getattr(layer.self_attn, name), "kind", None)
                    for name in ("q_proj", "k_proj", "v_proj")
                }
            )
            == 1
        )
        assert (
            len({getattr(getattr(layer.mlp, name), "kind", None) for name in ("gate_proj", "up_proj")}) == 1
        )


def test_the_curve_runs_from_int4_to_half_precision(call, tmp_path):
    assert call() == 0
    points = lines(tmp_path / "out" / "plans.jsonl")
    sizes = [point["bytes"] for point in points]
    assert points[-1]["perplexity_ratio"] == 1.0
    assert (points[-1]["plain_layers"], points[-2]["int8_layers"], points[0]["int8_layers"]) == (14, 14, 0)
    assert sizes[0] == min(sizes) < sizes[-2] < sizes[-1] == max(sizes)
    assert len(points) > 4
    report = (tmp_path / "out" / "report.md").read_text()
    assert all(words in report for words in ("all INT4 g32", "plan 1.25", "all INT8", "| plain |"))
    assert "The Vaults" not in report


def test_a_stopped_study_goes_on_with_the_next_unit(call, tmp_path, measured, monkeypatch, capsys):
    counting = study.measure_unit

    def stopping(*arguments):
        if len(measured) == 5:
            raise KeyboardInterrupt
        return counting(*arguments)

    monkeypatch.setattr(study, "measure_unit", stopping)
    assert call() == 130
    assert "goes on where this one stopped" in capsys.readouterr().err
    assert len(lines(tmp_path / "out" / "units.jsonl")) == 5
    monkeypatch.setattr(study, "measure_unit", counting)
    assert call() == 0
    assert len(measured) == len(set(measured)) == 14
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert call() == 0
    assert len(measured) == 14
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert call(budget=2) == 0  # another budget needs no unit anew
    assert len(measured) == 14


def test_other_flags_are_refused_or_start_anew(call, tmp_path, measured, capsys):
    assert call(by="layer") == 0
    before = (tmp_path / "out" / "units.jsonl").read_bytes()
    assert call(by="projection") == 2
    assert "another basis (by layer -> projection)" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text(TEXT + "more")
    assert call(by="layer") == 2
    assert (tmp_path / "out" / "units.jsonl").read_bytes() == before
    assert call("--no-resume", by="projection") == 0
    assert measured[:3] == ["layer 0", "layer 1", "self_attn.q_proj"]
    assert len(measured) == 9


def test_a_trial_in_8_bits(call, tmp_path):
    assert call(bits=8, group_size="none", by="layer") == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["default"] == {"bits": 8, "group_size": None, "zero_point": False}


def test_without_matplotlib_there_are_tables(call, tmp_path, monkeypatch, capsys):
    import precision.figures

    def missing(*_):
        raise figures.FiguresUnavailable("figures need matplotlib: pip install matplotlib")

    monkeypatch.setattr(precision.figures, "draw", missing)
    assert call(by="layer") == 3
    assert "pip install matplotlib" in capsys.readouterr().err
    assert "![" not in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"bits": 3}, "--bits: invalid choice"),
        ({"group_size": 48}, "--group_size got '48' with --bits 4"),
        ({"bits": 8}, "--group_size got '32' with --bits 8"),
        ({"tokens": 0}, "--tokens got '0'"),
        ({"window": 1}, "--window got '1'"),
        ({"window": 4000}, "--window got 4000, expected at most 96"),
        ({"budget": "0.5"}, "--budget got '0.5'"),
        ({"budget": "nan"}, "--budget got 'nan'"),
        ({"by": "head"}, "--by: invalid choice"),
        ({"dtype": "int3"}, "--dtype: invalid choice"),
        ({"token": 9}, "unknown argument '--token': did you mean '--tokens'?"),
        ({"device": "cuda:x"}, "--device got cuda:x, expected auto, cpu, cuda or cuda:N"),
        ({"model_name_or_path": "./nowhere"}, "no such directory"),
        ({"text": "wikitext2", "data_dir": "nowhere"}, "--data_dir nowhere is not a folder"),
    ],
)
def test_wrong_arguments_are_one_line(call, tmp_path, flags, message, capsys):
    assert call(**flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_is_told_before_anything_is_measured(
    call, tmp_path, measured, capsys
):
    assert call(output_dir=tmp_path / "text.txt") == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'text.txt'} cannot be a folder, a file is in the way; choose another" in error
    assert error.count("\n") == 1
    assert not measured


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "checkpoint is damaged"), (0.0, "model.layers.1.mlp.up_proj: every weight is zero")],
)
def test_weights_that_cannot_be_measured_write_nothing(call, checkpoint, tmp_path, value, message, capsys):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"].fill_(value)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert call() == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "short"])
def test_too_little_text_writes_nothing(call, tmp_path, text, capsys):
    (tmp_path / "text.txt").write_text(text)
    assert call() == 1
    error = capsys.readouterr().err
    assert "calibration text" in error
    assert not text or "give a longer --text or a smaller --window." in error
    assert not (tmp_path / "out").exists()


def test_a_quantised_checkpoint_is_refused(call, checkpoint, tmp_path, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "x"}})
    )
    assert call() == 2
    assert "quantised already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
