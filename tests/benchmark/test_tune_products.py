"""Tiles are timed on a GPU; what can be told without one: the candidates, the file that is written, and refusals."""

import json
from contextlib import nullcontext

import pytest
import torch

from benchmark import tune_products
from benchmark.product_times import FORMATS
from benchmark.tile_candidates import candidates
from benchmark.tune_products import TIMED_ROWS, TUNABLE, Tuning, report, run_tile, table
from huggingface.transformers.integrations import quantized_linear_tiles as tiles
from huggingface.transformers.integrations.gluon_support import gluon_unavailable
from huggingface.transformers.integrations.quantized_linear import (
    QuantizedWeight,
    quantized_linear_reference,
)
from huggingface.transformers.integrations.quantized_linear_tiles import (
    FragmentTile,
    MatrixRowTile,
    Product,
    RowsTile,
    RowTile,
)
from huggingface.transformers.integrations.triton_support import triton

WHERE = {"device_name": "cpu", "date": "2026-01-02T03:04:05+00:00", "torch": "2", "triton": "3"}


def tuned() -> Tuning:
    def timing(columns: int, seconds: float) -> dict:
        tile = {"columns": columns, "pieces": 128, "warps": 4, "ahead": False}
        return {
            "name": "some out", "format": "int4-128", "rows": 1, "outputs": 512, "inner": 256, "gated": False, "bytes": 66560,
            "tile": tile, "s": {1: seconds},
        }  # fmt: skip

    return Tuning(0.0, [timing(4, 3e-6), timing(8, 2e-6)], {(512, 256, 1): 5e-6})


@pytest.mark.parametrize("rows", TIMED_ROWS)
@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
@pytest.mark.skipif(gluon_unavailable() is not None, reason="some candidates are in Gluon")
def test_every_product_has_candidates_that_fill_the_device(kind, rows):
    for shape in (shape for parts in TUNABLE.values() for shape in parts.values()):
        product = Product(kind, rows, shape.outputs, shape.inner, shape.gated)
        found = candidates(product)
        assert len(found) == len(set(found)) > 2
        assert any(isinstance(tile, RowsTile) for tile in found)
        assert any(isinstance(tile, RowTile) for tile in found) == (rows == 1)
        matrix = [tile for tile in found if isinstance(tile, MatrixRowTile)]
        assert (len(matrix) > 0) == (rows == 1)
        assert all(product.takes(tile) for tile in matrix)
        fragments = [tile for tile in found if isinstance(tile, FragmentTile)]
        assert fragments or rows not in (8, 16)
        assert not fragments or 8 <= rows <= 64
        assert all(tile.fits(product) for tile in fragments)


def test_what_is_written_is_what_is_chosen(monkeypatch):
    monkeypatch.setattr(tiles, "_stored", lambda: {"cpu": table(tuned())})
    tiles.choose_tile.cache_clear()
    product = Product(FORMATS["int4"], 1, 512, 256, False)
    assert tiles.choose_tile(torch.device("cpu"), product) == RowTile(8, 128, 4, False)
    tiles.choose_tile.cache_clear()


def test_the_report_holds_the_fastest():
    text = report(tuned(), WHERE)
    assert "| int4-128 | 1 | 2.50 |" in text
    assert (
        "| some out | int4-128 | 1 | 2.0 | 0.03 | 5.0 | 2.50 | columns 8, pieces 128, warps 4, ahead False |"
        in text
    )
    assert "| some out | int4-128 | 1 | 3.0 us: columns 4, pieces 128, warps 4, ahead False |" in text


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "tile",
    [RowTile(4, 8, 1, False), MatrixRowTile(32, 1, 1), RowsTile(16, 32, 2, 4, 3), RowsTile(16, 64, 2, 4, 3)],
)
def test_a_tile_computes_the_product(tile, gated, kind):
    pytest.importorskip("triton")
    weight = QuantizedWeight.of(torch.randn(64, 256) / 16, FORMATS[kind])
    rows = torch.randn(1, 1, 256).half()
    expected = quantized_linear_reference(rows, weight, activation="silu" if gated else None, gated=gated)
    torch.testing.assert_close(run_tile(tile, rows, weight, gated), expected, atol=4e-3, rtol=4e-3)


def test_tuning_one_row_alone_leaves_the_rest_of_the_file(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    asked = []

    def tune(compilers, models, rows, device, seconds):
        asked.extend(rows)
        return tuned()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_products, "Compilers", nullcontext)
    monkeypatch.setattr(tune_products, "tune", tune)
    monkeypatch.setattr(tune_products, "setting", lambda device: WHERE)
    other, old, kept = {"columns": 1}, {"columns": 2}, {"columns": 3}
    before = {
        "other": {"int8": {"1": {"512x256": other}}},
        "cpu": {"int8": {"1": {"512x256": kept}}, "int4-128": {"1": {"512x256": old, "8x8": kept}, "16": {"512x256": kept}}},
    }  # fmt: skip
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps(before), encoding="utf-8")
    assert tune_products.main(["--output", str(file), "--rows", "1"]) == 0
    assert asked == [1]
    before["cpu"]["int4-128"]["1"]["512x256"] = {"columns": 8, "pieces": 128, "warps": 4, "ahead": False}
    assert json.loads(file.read_text(encoding="utf-8")) == before


@pytest.mark.skipif(triton is None, reason="the lack of Triton is told first")
@pytest.mark.parametrize("words", [["--models", "gpt_9b"], ["--rows", "1,17"], []])
def test_an_unknown_model_or_no_gpu_ends_at_once(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        tune_products.main(["--output", str(tmp_path / "tiles.json"), *words])
    assert ended.value.code == 2
    message = {"--models": "gpt_9b", "--rows": "['17']"}[words[0]] if words else "CUDA"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tiles.json").exists()
