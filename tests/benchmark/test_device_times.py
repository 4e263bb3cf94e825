"""What programs that time kernels share, without a GPU: what is kept of a run that was cut."""

from __future__ import annotations

import json

import pytest
import torch

from benchmark import device_times, product_times, step_times
from huggingface.transformers.integrations import triton_support


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_support, "unavailable", lambda device: None)


def _run(measure, folder) -> int:
    words = ["--output_dir", str(folder), "--shapes", "one,two"]
    shapes = {"one": 1, "two": 2}
    return device_times.run("a program", "What it does.", shapes, "times", measure, str, words)


def test_a_cut_run_keeps_what_it_had(a_gpu, tmp_path):
    def measure(names, device):
        yield {"measured": names[:1]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(measure, tmp_path)
    assert json.loads((tmp_path / "times.json").read_text()) == {"measured": ["one"]}
    assert (tmp_path / "times.md").read_text() == "{'measured': ['one']}"


def test_the_last_result_is_shown(a_gpu, tmp_path, capsys):
    assert _run(lambda names, device: iter([{"n": 1}, {"n": 2}]), tmp_path) == 0
    assert capsys.readouterr().out == "{'n': 2}"
    assert json.loads((tmp_path / "times.json").read_text()) == {"n": 2}


def test_steps_are_told_shape_by_shape_and_products_one_by_one(monkeypatch):
    for module in (step_times, product_times):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 1e12)
        monkeypatch.setattr(module, "setting", lambda device: {})
    monkeypatch.setattr(step_times, "measure_shape", lambda shape, device, ceiling: {"layers": shape.layers})
    monkeypatch.setattr(step_times, "measure_attention", lambda shape, device: [shape.heads])
    names = list(step_times.SHAPES)
    seen = [
        (list(result["shapes"]), list(result["attention"]))
        for result in step_times.measure(names, torch.device("cpu"))
    ]
    assert [shapes for shapes, _ in seen] == [names[:1], names[:2], names]
    assert [len(rows) for _, rows in seen] == [1, 2, 3]

    properties = type("Properties", (), {"L2_cache_size": 1})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        product_times, "measure_shape", lambda shape, device, cache: {"outputs": shape.outputs}
    )
    counts = [
        len(result["products"]) for result in product_times.measure(["mistral_7b"], torch.device("cpu"))
    ]
    assert counts == [1, 2, 3, 4]
