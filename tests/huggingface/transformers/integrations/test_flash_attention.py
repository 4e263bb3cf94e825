"""The flash function against its reference and, for the reference, against softmax attention written out."""

import math

import pytest
import torch
from torch import nn

from huggingface.transformers.integrations import flash_attention
from huggingface.transformers.integrations.flash_attention import (
    flash_attention_forward,
    reference_attention,
)

SHAPES = [  # batch, queries, keys, heads, kv_heads, head_dim
    (1, 1, 1, 1, 1, 8),
    (2, 1, 37, 4, 2, 16),
    (2, 37, 37, 4, 4, 16),
    (1, 5, 37, 6, 2, 24),
]


def tensors(batch, queries, keys, heads, kv_heads, head_dim, dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    shapes = (
        (batch, heads, queries, head_dim),
        (batch, kv_heads, keys, head_dim),
        (batch, kv_heads, keys, head_dim),
    )
    return [torch.randn(shape, dtype=torch.float64).to(device=device, dtype=dtype) for shape in shapes]


def by_hand(query, key, value, scale, window, padding):
    """One query, head and row at a time: (batch, queries, heads, head_dim)."""
    batch, heads, queries, width = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    output = torch.zeros(batch, queries, heads, width, dtype=query.dtype)
    for row in range(batch):
        for head in range(heads):
            for place in range(queries):
                position = keys - queries + place
                seen = [
                    k for k in range(position + 1)
                    if (window is None or position - k < window) and (padding is None or padding[row, k])
                ]  # fmt: skip
                if not seen or (padding is not None and not padding[row, position]):
                    continue
                scores = (
                    torch.stack([query[row, head, place] @ key[row, head // group, k] for k in seen]) * scale
                )
                output[row, place, head] = scores.softmax(0) @ value[row, head // group, seen]
    return output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_function_equals_attention_by_hand(shape, window, padded):
    query, key, value = tensors(*shape)
    padding = torch.ones(shape[0], shape[2], dtype=torch.long)
    if padded:
        padding[0, : shape[2] // 2] = 0
    output, weights = flash_attention_forward(
        nn.Module(), query, key, value, padding, scaling=1.0, sliding_window=window
    )
    assert weights is None
    torch.testing.assert_close(output, by_hand(query, key, value, 1.0, window, padding))


def test_default_scale_and_no_mask():
    query, key, value = tensors(1, 6, 6, 2, 2, 16)
    output, _ = flash_attention_forward(nn.Module(), query, key, value, None)
    torch.testing.assert_close(output, by_hand(query, key, value, 1 / math.sqrt(16), None, None))


def test_right_padding_and_empty_row():
    query, key, value = tensors(3, 9, 9, 2, 2, 8)
    padding = torch.ones(3, 9, dtype=torch.bool)
    padding[0, 6:] = False
    padding[1] = False
    output, _ = flash_attention_forward(nn.Module(), query, key, value, padding, scaling=1.0)
    torch.testing.assert_close(output, by_hand(query, key, value, 1.0, None, padding))


def test_not_causal():
    query, key, value = tensors(1, 5, 5, 2, 2, 8)
    output, _ = flash_attention_forward(nn.Module(), query, key, value, None, is_causal=False, scaling=1.0)
    weights = (query @ key.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(output, (weights @ value).transpose(1, 2))


def test_tree_mask_is_refused():
    query, key, value = tensors(1, 5, 5, 2, 2, 8)
    with pytest.raises(ValueError, match="use sdpa for trees"):
        flash_attention_forward(nn.Module(), query, key, value, torch.ones(1, 1, 5, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("padding", "options", "message"),
    [
        ([[1, 0, 1, 1, 1]], {}, "gaps"),
        ([[1, 1, 1]], {}, "no static cache"),
        (None, {"dropout": 0.1}, "dropout"),
        (None, {"softcap": 30.0}, "softcap"),
    ],
)
def test_what_the_kernels_lack_is_refused(padding, options, message):
    query, key, value = tensors(1, 5, 5, 2, 2, 8)
    mask = None if padding is None else torch.tensor(padding)
    with pytest.raises(ValueError, match=message):
        flash_attention_forward(nn.Module(), query, key, value, mask, **options)


def test_registered_under_a_name_upstream_leaves_alone():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    flash_attention.register()
    assert ALL_ATTENTION_FUNCTIONS[flash_attention.NAME] is flash_attention_forward
    assert "flash" not in flash_attention.NAME


def test_what_runs_is_described():
    assert flash_attention.describe("cpu") == "flash: plain-PyTorch reference"


def test_self_check_passes_the_reference_and_catches_a_kernel_without_window(monkeypatch):
    case = ((13, 70), (4, 2), 16, 5, torch.bfloat16, "cpu")
    error, allowed = flash_attention.kernel_error(*case)
    assert error <= allowed

    def windowless(query, key, value, scale, window, causal):
        return reference_attention(query, key, value, scale, None, causal)

    monkeypatch.setattr(flash_attention, "_kernel", lambda device: windowless)
    error, allowed = flash_attention.kernel_error(*case)
    assert error > allowed


@pytest.mark.gpu
def test_kernel_equals_reference():
    assert flash_attention.self_check() == []


@pytest.mark.gpu
def test_kernel_inside_torch_equals_reference(monkeypatch):
    monkeypatch.setattr(flash_attention, "_flash_attn_installed", lambda: False)
    assert flash_attention.self_check() == []


@pytest.mark.gpu
def test_padded_rows_on_gpu():
    query, key, value = tensors(2, 1, 50, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    padding = torch.ones(2, 50, dtype=torch.long, device="cuda")
    padding[0, :20] = 0
    output, _ = flash_attention_forward(nn.Module(), query, key, value, padding, sliding_window=16)
    alone, _ = flash_attention_forward(
        nn.Module(), query[:1], key[:1, :, 20:], value[:1, :, 20:], None, sliding_window=16
    )
    torch.testing.assert_close(output[:1], alone)
