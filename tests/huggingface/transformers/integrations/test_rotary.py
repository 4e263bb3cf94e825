"""The rotary kernel turns queries and keys as upstream does, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from huggingface.transformers.integrations import rotary
from huggingface.transformers.integrations.rotary import apply_rotary_, apply_rotary_reference_
from huggingface.transformers.integrations.triton_support import unavailable

from . import compile_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")


def random_step(batch, rows, heads, kv_heads, head_dim, dtype=torch.float32, angle_batch=None):
    generator = torch.Generator().manual_seed(head_dim)
    projected = torch.randn(batch, rows, (heads + 2 * kv_heads) * head_dim, generator=generator)
    angles = torch.randn(angle_batch or batch, rows, head_dim, generator=generator)
    return [part.to(dtype).to(DEVICE) for part in (projected, angles.cos(), angles.sin())]


def upstream(projected, cos, sin, heads, kv_heads):
    per_head = projected.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    query, key, value = per_head.split([heads, kv_heads, kv_heads], dim=1)
    turned = apply_rotary_pos_emb(query, key, cos, sin)
    return torch.cat([*turned, value], dim=1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("turn", [apply_rotary_, apply_rotary_reference_])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (33, 11)])
def test_turns_as_upstream_does(turn, head_dim, heads, kv_heads):
    projected, cos, sin = random_step(2, 3, heads, kv_heads, head_dim)
    expected = upstream(projected, cos, sin, heads, kv_heads)
    turn(projected, cos, sin, heads, kv_heads)
    torch.testing.assert_close(projected, expected)


def test_values_stay_as_they_are():
    projected, cos, sin = random_step(2, 3, 4, 2, 16)
    before = projected.clone()
    apply_rotary_(projected, cos, sin, 4, 2)
    assert torch.equal(projected[..., 6 * 16 :], before[..., 6 * 16 :])
    assert (projected[..., : 6 * 16] != before[..., : 6 * 16]).any(0).all()


def test_angles_may_be_shared_by_the_batch():
    projected, cos, sin = random_step(3, 2, 2, 1, 16, angle_batch=1)
    expected = upstream(projected, cos, sin, 2, 1)
    apply_rotary_(projected, cos, sin, 2, 1)
    torch.testing.assert_close(projected, expected)


def test_float16_loses_at_most_twice_what_upstream_loses():
    projected, cos, sin = random_step(1, 5, 4, 2, 64, torch.float16)
    exact = upstream(projected.float(), cos.float(), sin.float(), 4, 2)
    loss = (upstream(projected, cos, sin, 4, 2) - exact).abs().max()
    apply_rotary_(projected, cos, sin, 4, 2)
    assert (projected - exact).abs().max() <= 2 * loss


def test_without_triton_the_reference_runs(monkeypatch):
    monkeypatch.setattr(rotary, "unavailable", lambda device: "no Triton")
    projected, cos, sin = random_step(1, 2, 2, 1, 16)
    expected = upstream(projected, cos, sin, 2, 1)
    apply_rotary_(projected, cos, sin, 2, 1)
    torch.testing.assert_close(projected, expected)


def test_a_wrong_number_of_heads_is_named():
    projected, cos, sin = random_step(1, 2, 2, 1, 16)
    with pytest.raises(ValueError, match="does not fit 3 and 1 heads of 16"):
        apply_rotary_(projected, cos, sin, 3, 1)


def test_compiles_without_spills():
    kernels = []
    for kind, head_dim in (("fp16", 128), ("bf16", 80), ("fp32", 128)):
        pointers = dict.fromkeys(("projected", "cos", "sin"), f"*{kind}")
        strides = [f"{name}_{stride}_stride" for name in ("cos", "sin") for stride in ("batch", "row")]
        signature = pointers | dict.fromkeys(("rows", "turned_heads", "row_size", *strides), "i32")
        constants = {"HALF": head_dim // 2, "WIDTH": 64, "HEADS_PER_PROGRAM": rotary.PAIRS_PER_PROGRAM // 64}
        place = "huggingface.transformers.integrations.rotary"
        kernels.append((place, "_rotary_kernel", signature, constants, 4, 3, ["row_size", *strides]))
    for usages in compile_check.compile_kernels(kernels):
        assert all(usage.fits for usage in usages), usages
