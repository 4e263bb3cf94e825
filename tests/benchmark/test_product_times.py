"""Times of products are measured on a GPU; what can be told without one: the report, the ways, and refusals."""

import pytest
import torch
import torch.nn.functional as F

from benchmark import product_times
from benchmark.product_times import FORMATS, ROWS, geometric_mean, product_of, report, speedups
from huggingface.transformers.integrations import quantized_linear


def result() -> dict:
    def cell(scale: float) -> dict:
        return {
            way: {"s": seconds * scale, "bytes_per_s": 1e12}
            for way, seconds in (("bf16", 4e-5), ("int8", 2e-5), ("int4", 1e-5))
        }

    products = [
        {
            "model": "some",
            "product": name,
            "outputs": 64,
            "inner": 32,
            "rows": {str(n): cell(scale) for n in ROWS},
        }
        for name, scale in (("qkv", 1.0), ("out", 2.0))
    ]
    products[1]["rows"]["1"]["int4"]["s"] = (
        8e-5  # twice its half-precision product's speed is not reached here
    )
    return {
        "date": "2026-01-02T03:04:05+00:00", "device_name": "a device", "torch": "2", "triton": "3", "dtype": "bfloat16",
        "weights": "random", "bandwidth_bytes_per_s": 4e12, "cache_bytes": 1, "missing": {"bnb_nf4": "bitsandbytes"},
        "products": products,
    }  # fmt: skip


def test_the_mean_is_of_ratios():
    assert speedups(result(), "int4", 1) == pytest.approx([4.0, 1.0])
    assert geometric_mean([4.0, 1.0]) == pytest.approx(2.0)
    assert speedups(result(), "int8", 33) == pytest.approx([2.0, 2.0])


def test_the_report_names_every_product_and_what_is_missing():
    text = report(result())
    assert "| 1 | 2.00 | 2.00 |" in text
    assert "| some | out 64 x 32 | 1 | 80.0 (1.00) | 40.0 (1.00) | 80.0 (1.00) |" in text
    assert "bnb_nf4 was not measured: bitsandbytes is not installed." in text
    assert "2026-01-02" in text


@pytest.mark.parametrize("way", ["bf16", *FORMATS])
def test_every_way_computes_the_product(way, monkeypatch):
    # Triton's interpreter multiplies bfloat16 wrongly; the kernels have tests of their own.
    monkeypatch.setattr(quantized_linear, "unavailable", lambda device: "no Triton")
    weight = torch.randn(40, 256).bfloat16()
    rows = torch.randn(1, 3, 256).bfloat16()
    product, stored = product_of(way, weight)
    expected = F.linear(rows.float(), weight.float())
    off = (product(rows).float() - expected).norm() / expected.norm()
    assert off < {"bf16": 0.01, "int8": 0.03, "int4": 0.2}[way]
    assert stored == {"bf16": 40 * 512, "int8": 40 * 260, "int4": 40 * (128 + 4)}[way]


@pytest.mark.parametrize("words", [["--shapes", "gpt_9b"], []])
def test_an_unknown_shape_or_no_gpu_ends_at_once(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        product_times.main(["--output_dir", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert ("gpt_9b" if words else "CUDA") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
