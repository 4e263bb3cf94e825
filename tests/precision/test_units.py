"""Units of a model's linear layers, and which of them a plan keeps together."""

import pytest

from precision.units import inseparable, place, units

LLAMA = [
    f"model.layers.{layer}.{part}"
    for layer in range(2)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer.h.3.attn.attention.q_proj", ("3", "attn.attention.q_proj")),
        ("model.decoder.layers.11.fc1", ("11", "fc1")),
        ("model.project_in", ("outside", "model.project_in")),
    ],
)
def test_place(name, expected):
    assert place(name) == expected


def test_units_cover_every_layer_once():
    for by, count in (("module", 14), ("layer", 2), ("projection", 7)):
        found = units(LLAMA, by)
        assert len(found) == count
        assert sorted(name for unit in found for name in unit.modules) == sorted(LLAMA)
    assert units(LLAMA, "layer")[1].name == "layer 1"
    assert units(LLAMA, "projection")[0].modules == (LLAMA[0], LLAMA[7])


def test_what_one_product_reads_stays_together():
    modules = [unit.modules for unit in units(LLAMA, "module")]
    assert inseparable(modules) == [[0, 1, 2], [3], [4, 5], [6], [7, 8, 9], [10], [11, 12], [13]]
    assert inseparable([unit.modules for unit in units(LLAMA, "projection")]) == [[0, 1, 2], [3], [4, 5], [6]]
    assert inseparable([unit.modules for unit in units(LLAMA, "layer")]) == [[0], [1]]
    assert inseparable([["a.q_proj"], ["b.q_proj"], ["a.k_proj", "b.k_proj"]]) == [[0, 1, 2]]
