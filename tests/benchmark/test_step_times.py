"""Step times are measured on a GPU; what can be told without one: the report, and refusals."""

import json
from pathlib import Path

import pytest
import torch

from benchmark import step_times

SAVED = Path(__file__).parents[2] / "images" / "results" / "h200_steps"


def test_the_saved_table_is_the_report_of_the_saved_figures():
    result = json.loads((SAVED / "steps.json").read_text())
    assert step_times.report(result) == (SAVED / "steps.md").read_text()


def test_shares_follow_from_the_bytes_read_and_the_bandwidth():
    result = json.loads((SAVED / "steps.json").read_text())
    for shape in result["shapes"].values():
        floor = shape["weight_bytes_read"] / result["bandwidth_bytes_per_s"]
        assert shape["share_of_ceiling"] == pytest.approx(floor / shape["plain"]["step_s"])
        for tree in shape["trees"].values():
            assert tree["ratio"] == pytest.approx(tree["step_s"] / shape["plain"]["step_s"])


@pytest.mark.parametrize("words", [["--shapes", "gpt_neo_9b"], []])
def test_an_unknown_shape_or_no_gpu_ends_at_once(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        step_times.main(["--output_dir", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert ("gpt_neo_9b" if words else "CUDA") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
