"""The tolerance is what it says: four times the largest difference between a plain step and a tree's root."""

import json

import pytest
import torch

from benchmark import logit_tolerance

SHIPPED = "checkpoints/spec_stream_9m"


@pytest.mark.gpu
def test_of_the_shipped_model(tmp_path, capsys):
    words = ["--model_name_or_path", SHIPPED, "--limit", "1", "--nodes", "8", "--dtype", "float32"]
    assert logit_tolerance.main([*words, "--output_dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "tolerance.json").read_text())
    assert 1 <= result["compared"] <= result["prefixes"]
    assert result["tolerance"] == 4 * result["largest_difference"]
    # Rounding of float32, no more: logits of this model reach some tens.
    assert result["largest_difference"] < 0.01
    assert "tolerance" in capsys.readouterr().out


def test_a_step_that_computes_something_else_is_seen(monkeypatch):
    def logits(model, prefix, plan):
        return 3, torch.full((5,), float(plan.shape.nodes))

    class Model:
        class streams:
            class config:
                streams = 2

    monkeypatch.setattr(logit_tolerance, "root_logits", logits)
    monkeypatch.setattr(logit_tolerance, "_prefixes", lambda model, prompts: prompts)
    monkeypatch.setattr(
        logit_tolerance,
        "make_plan",
        lambda *given: logit_tolerance.DraftPlan(logit_tolerance.DraftPlan.plain().shape, source="given"),
    )
    assert logit_tolerance.measure(Model, [torch.zeros(1, 2)], 8)["largest_difference"] == 0
    monkeypatch.setattr(logit_tolerance, "root_logits", lambda *given: (next(roots), torch.zeros(5)))
    roots = iter([1, 2])
    with pytest.raises(ValueError, match="compared"):
        logit_tolerance.measure(Model, [torch.zeros(1, 2)], 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "65"], "2 to 64"),
        (["--data_dir", "nowhere"], "nowhere"),
        (["--limit", "0"], "limit"),
        (["--model_name_or_path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_before_anything_is_written(words, said, tmp_path, capsys):
    given = ["--model_name_or_path", SHIPPED, "--output_dir", str(tmp_path / "out"), *words]
    with pytest.raises(SystemExit) as ended:
        logit_tolerance.main(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
