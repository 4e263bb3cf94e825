"""Quality of every weight format: what is written, that outliers change no output, and refusals that write nothing."""

import json

import pytest
import torch

from benchmark import quantised_quality
from huggingface.transformers.models.spec_stream import stock_class
from precision import quality
from precision.calibration import Sample, Text
from tests.models.conftest import save_tokenizer, tiny_config

TEXT = "name[The Vaults], eatType[pub], priceRange[more than 30]. " * 16
WIDTH = 256
NAMES = ["plain", "int8", "int4 naive", "int4 g128", "int4 g32", "awq g128", "plan"]
MODELS = ["as trained", "isolated", "runs"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def checkpoint(request, tmp_path_factory):
    """A tiny checkpoint, wide enough for two runs of outliers."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(1)
    config = tiny_config(request.param)
    config.hidden_size = WIDTH
    config.num_hidden_layers = 2
    if hasattr(config, "head_dim"):
        config.head_dim = WIDTH // config.num_attention_heads
    stock_class(config)(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    directory = tmp_path_factory.mktemp("narrow")
    config = tiny_config("llama")
    stock_class(config)(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def call(tmp_path):
    """Runs the program on a text file; the folder it writes is `out`."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = {
        "--text": text,
        "--output_dir": tmp_path / "out",
        "--tokens": 190,
        "--plan_tokens": 95,
        "--device": "cpu",
    }

    def run(**flags):
        given = common | {f"--{name}": value for name, value in flags.items()}
        return quantised_quality.main([str(part) for pair in given.items() for part in pair])

    return run


def test_every_format_is_judged_on_every_model(call, checkpoint, tmp_path, capsys):
    assert call(model_name_or_path=checkpoint, model_label="some model") == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["quality.json", "quality.md"]
    result = json.loads((out / "quality.json").read_text())
    text = (out / "quality.md").read_text()
    assert capsys.readouterr().out == text
    assert [(row["model"], row["weights"]) for row in result["rows"]] == [
        (m, name) for m in MODELS for name in NAMES
    ]
    assert (result["model"], result["dtype"], result["text"]) == ("some model", "float32", "text.txt")
    assert result["judged_tokens"] >= 190
    assert result["choosing_tokens"] == 95
    assert str(tmp_path) not in json.dumps(result)
    assert "The Vaults" not in text + json.dumps(result)
    for words in ("## As trained", "## Isolated outliers", "| awq g128 |", "Plan: "):
        assert words in text
    rows = {(row["model"], row["weights"]): row for row in result["rows"]}
    for model in MODELS:
        assert rows[model, "plain"]["nll_change"] == 0.0
        assert rows[model, "int4 g128"]["nll_against_g128"] == 0.0
        small, plan = rows[model, "int4 g128"]["bytes"], rows[model, "plan"]["bytes"]
        assert small == rows[model, "awq g128"]["bytes"] < plan <= 1.25 * small
        assert result["plans"][model]["modules"]
    assert rows["runs", "int4 g128"]["nll_change"] == pytest.approx(
        rows["as trained", "int4 g128"]["nll_change"], abs=0.02
    )
    assert rows["as trained", "plan"]["perplexity"] == pytest.approx(
        rows["as trained", "plain"]["perplexity"] * (1 + rows["as trained", "plan"]["change_percent"] / 100)
    )


def test_an_output_folder_that_cannot_be_is_told_before_anything_is_measured(
    call, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(quantised_quality, "measure", lambda flags: pytest.fail("measured"))
    for folder in ("text.txt", "text.txt/below"):
        assert call(output_dir=tmp_path / folder) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / folder} cannot be a folder, a file is in the way; choose another" in error
        assert error.count("\n") == 1

    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("benchmark.run_directory.write_atomically", refuse)
    assert call(output_dir=tmp_path / "new" / "out") == 2
    assert "Permission denied): choose another --output_dir" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_text_that_is_too_short_is_told_with_flags_that_there_are(call, checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("name")
    assert call(model_name_or_path=checkpoint) == 1
    error = capsys.readouterr().err
    assert "give a longer --text." in error
    assert "--window" not in error


def test_an_interrupted_call_writes_nothing(call, checkpoint, tmp_path, monkeypatch, capsys):
    def stop(subject):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "measure_quality", stop)
    assert call(model_name_or_path=checkpoint) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_recovered_is_a_share_of_the_loss_in_groups():
    rows = [
        {"model": "m", "weights": name, "nll_change": value}
        for name, value in (("int4 g128", 0.04), ("plan", 0.01))
    ]
    assert quality._recovered(rows, "m") == pytest.approx(0.75)
    rows[0]["nll_change"] = -0.01
    assert quality._recovered(rows, "m") is None


def test_outliers_are_whole_runs_and_one_at_least():
    assert quality.outlier_channels(768, "isolated") == 48
    assert quality.outlier_channels(768, "runs") == 128
    assert quality.outlier_channels(2048, "runs") == 512
    assert quality.outlier_channels(256, "runs") == 128


def test_calibration_is_cut_into_windows():
    samples = [Sample([1, 2, 3], [4, 5]), Sample([6], [7, 8, 9, 10, 11, 12])]
    found = quality.calibration(samples, 2, torch.device("cpu"))
    assert [tuple(batch.shape) for batch in found] == [(2, 2), (2, 2), (2, 2)]
    assert torch.cat(found).flatten().tolist() == list(range(1, 13))
    assert [tuple(batch.shape) for batch in quality.calibration(samples, 100, torch.device("cpu"))] == [
        (1, 12)
    ]


def test_a_reference_that_judges_chooses_nothing(monkeypatch):
    rows = {"validation": [("a", " one"), ("b", " two")], "train": [("c", " three"), ("d", " two")]}
    monkeypatch.setattr(
        quality, "read_text", lambda name, folder, split="validation": Text("", tuple(rows[split]), split)
    )
    texts = quality.read_texts("references", None)
    assert (texts.judge.pairs, texts.choose.pairs) == ((("a", " one"), ("b", " two")), (("c", " three"),))
    rows["train"] = rows["validation"]
    assert quality.read_texts("references", None).choose is None


def test_where_a_text_comes_from_names_no_folder():
    found = quantised_quality._without_folder("spider (data_dir:/some/where), dialogsum (samples)")
    assert found == "spider (official release files), dialogsum (samples)"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ({"tokens": 0}, 2, "--tokens: got '0'"),
        ({"plan_tokens": "many"}, 2, "--plan_tokens: got 'many'"),
        ({"dtype": "int3"}, 2, "--dtype: invalid choice"),
        ({"plan_token": 9}, 2, "unknown argument '--plan_token': did you mean '--plan_tokens'?"),
        ({"device": "foo"}, 2, "--device got foo, expected auto, cpu, cuda or cuda:N"),
        ({"model_name_or_path": "./nowhere"}, 2, "no such directory"),
        ({"text": "references", "data_dir": "nowhere"}, 2, "--data_dir nowhere is not a folder"),
        ({"text": "nowhere.txt"}, 1, "cannot be read"),
        ({}, 1, "two runs of 128"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(call, narrow, tmp_path, flags, code, message, capsys):
    assert call(**{"model_name_or_path": narrow, **flags}) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
