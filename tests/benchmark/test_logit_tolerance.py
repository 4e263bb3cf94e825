"""The tolerance is what it says: four times the largest difference between a plain step and a tree's root."""

import json

import pytest
import torch

from benchmark import logit_tolerance
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.tree_tuning import DraftPlan

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


class Model:
    class streams:
        class config:
            streams = 2


@pytest.fixture
def tree_of_three(monkeypatch):
    """One prefix, and a tree of three nodes beside the plain step of one."""
    tree = DraftPlan(TreeShape((-1, 0, 0), 1))
    monkeypatch.setattr(logit_tolerance, "make_plan", lambda *given: tree)
    monkeypatch.setattr(logit_tolerance, "_prefixes", lambda model, prompts: prompts)


@pytest.mark.usefixtures("tree_of_three")
def test_the_tolerance_is_four_times_the_largest_difference(monkeypatch):
    def logits(model, prefix, plan):
        return 3, torch.tensor([0.0, 1.5 * plan.shape.nodes * prefix.shape[1]])

    monkeypatch.setattr(logit_tolerance, "root_logits", logits)
    result = logit_tolerance.measure(Model, [torch.zeros(1, 2), torch.zeros(1, 1)], 3)
    assert result == {"prefixes": 2, "compared": 2, "largest_difference": 6.0, "tolerance": 24.0}


@pytest.mark.usefixtures("tree_of_three")
def test_different_roots_are_not_compared(monkeypatch):
    monkeypatch.setattr(
        logit_tolerance, "root_logits", lambda model, prefix, plan: (plan.shape.nodes, torch.zeros(5))
    )
    with pytest.raises(ValueError, match="compared"):
        logit_tolerance.measure(Model, [torch.zeros(1, 2)], 3)


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
