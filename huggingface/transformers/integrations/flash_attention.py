"""FlashAttention-2 on upstream's attention interface, under the name `fa2`.

Upstream's `flash_attention_2` needs the flash-attn package, and its GPT-Neo drops the local window and so attends globally. This
function takes the window wherever the attention module gives one. It runs flash-attn where that is installed, else the same
kernel inside torch, which `scaled_dot_product_attention` reaches without a window; tensors on a CPU take the reference.

Adds `fa2` to upstream's `AttentionInterface` and `AttentionMaskInterface`; replaces nothing. Upstream's counterpart is
`transformers.integrations.flash_attention.flash_attention_forward`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/flash_attention.py. Differences: the window
and the scale of the module hold; padded rows run one by one, each on a view of its own keys, instead of being copied together.

Paper: "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", arXiv 2307.08691. The kernels are
Dao-AILab's (BSD-3-Clause).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

# Upstream takes any name with "flash" in it for a kernel that it has to import from a package or the hub.
NAME = "fa2"
KERNEL_DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# Keyword arguments of other attention functions that would change the result if they were dropped.
UNSUPPORTED = ("softcap", "s_aux")

Span = tuple[int, int]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int | None, bool], torch.Tensor]


def register() -> None:
    """Registers the function with upstream's attention and mask interfaces; a second call changes nothing."""
    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def describe(device: torch.device | str) -> str:
    """Returns which kernel runs on a device."""
    if torch.device(device).type != "cuda":
        return "flash: plain-PyTorch reference"
    if _flash_attn_installed():
        return f"flash: flash-attn {importlib.metadata.version('flash-attn')}"
    return f"flash: FlashAttention-2 of torch {torch.__version__}"


def flash_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Returns (batch, queries, heads, head_dim) attention output; rows of padding are zero.

    Queries are the last positions of the keys: query i sees keys up to `keys - queries + i`.

    Args:
        module: the attention module, for its `is_causal`.
        query: (batch, heads, queries, head_dim); float16 or bfloat16 on CUDA, head_dim a multiple of 8 up to 256.
        key: (batch, kv_heads, keys, head_dim); `value` likewise. `heads` is a multiple of `kv_heads`.
        attention_mask: (batch, keys) padding mask with the valid keys of a row in one run, or `None` for no padding.
        dropout: must be 0; this is for inference.
        scaling: factor on the scores; default 1/sqrt(head_dim).
        sliding_window: a query sees at most so many keys, its own included; `None` for no limit.
        is_causal: default: the module's.

    Raises:
        ValueError: a mask that is not padding (these kernels take no trees), or inputs the kernels do not take.
    """
    _check(query, attention_mask, dropout, kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    spans = _spans(attention_mask, key.shape[2])
    attend = _kernel(query.device)
    # The kernels take (batch, rows, heads, head_dim).
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if spans is None:
        return attend(query, key, value, scale, sliding_window, causal), None
    output = torch.zeros_like(query)
    hidden = key.shape[1] - query.shape[1]
    for row, (start, stop) in enumerate(spans):
        first, last = max(start - hidden, 0), stop - hidden
        if last > first:
            one = slice(row, row + 1)
            output[one, first:last] = attend(
                query[one, first:last],
                key[one, start:stop],
                value[one, start:stop],
                scale,
                sliding_window,
                causal,
            )
    return output, None


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Returns softmax(scale * query key^T + mask) value in plain PyTorch, computed in at least float32.

    Args:
        query: (batch, queries, heads, head_dim).
        key: (batch, keys, kv_heads, head_dim); `value` likewise.
        scale: factor on the scores.
        window: a query sees at most so many keys, its own included.
        causal: query i is at position keys - queries + i and sees no key after it.

    Returns:
        (batch, queries, heads, head_dim) in the query's dtype.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[2] // key.shape[2]
    keys = key.to(wide).repeat_interleave(groups, dim=2)
    values = value.to(wide).repeat_interleave(groups, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query.to(wide), keys) * scale
    queries, count = query.shape[1], key.shape[1]
    position = torch.arange(count - queries, count, device=query.device)[:, None]
    distance = position - torch.arange(count, device=query.device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(query.dtype)


def torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Returns what :func:`reference_attention` does, by the FlashAttention-2 kernel inside torch."""
    left, right = _window_sides(window, causal)
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        None,  # no packed sequences
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
    )[0]


def flash_attn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """Returns what :func:`reference_attention` does, by the flash-attn package (2.1 or newer aligns queries to the last keys)."""
    from flash_attn import flash_attn_func

    sides = tuple(-1 if side is None else side for side in _window_sides(window, causal))
    return flash_attn_func(query, key, value, softmax_scale=scale, causal=causal, window_size=sides)


def kernel_error(
    lengths: tuple[int, int],
    heads: tuple[int, int],
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
    device: str = "cuda",
) -> tuple[float, float]:
    """Returns the largest error of the device's kernel and the error it may have, on random inputs against float64.

    The kernels round the softmax weights to `dtype` before the product with the values, which costs up to one unit in the last
    place of the largest value; the reference rounds its result alone.

    Args:
        lengths: queries and keys.
        heads: query and key/value heads.
        head_dim: width of a head.
        window: a query sees at most so many keys; `None` for no limit.
        dtype: of the inputs.
        device: where the kernel runs.
    """
    generator = torch.Generator().manual_seed(0)
    rows = ((lengths[0], heads[0]), (lengths[1], heads[1]), (lengths[1], heads[1]))
    query, key, value = (
        torch.randn(2, count, number, head_dim, generator=generator).to(device=device, dtype=dtype)
        for count, number in rows
    )
    scale = head_dim**-0.5
    exact = reference_attention(query.double(), key.double(), value.double(), scale, window)
    rounded = reference_attention(query, key, value, scale, window)
    got = _kernel(query.device)(query, key, value, scale, window, True)
    allowed = 2 * (rounded - exact).abs().max().item() + torch.finfo(dtype).eps * value.abs().max().item()
    return (got - exact).abs().max().item(), allowed


def self_check(device: str = "cuda") -> list[str]:
    """Returns one line per case in which the device's kernel strays from the reference; an empty list is the good answer.

    `python -c "from huggingface.transformers.integrations.flash_attention import self_check; raise SystemExit(self_check())"`
    """
    cases = itertools.product(
        ((1, 1), (1, 700), (700, 700), (13, 700), (300, 301)),
        ((4, 4), (8, 2), (6, 2)),
        (64, 80, 128),
        (None, 1, 5, 64, 256, 1000),
        KERNEL_DTYPES,
    )
    wrong = []
    for case in cases:
        error, allowed = kernel_error(*case, device)
        # Negated so that an undefined error counts as one.
        if not error <= allowed:
            wrong.append(
                f"(lengths, heads, head_dim, window, dtype) {case}: error {error:.3g}, allowed {allowed:.3g}"
            )
    return wrong


def _window_sides(window: int | None, causal: bool) -> tuple[int | None, int | None]:
    """Returns keys visible to the left and right of a query's own; the kernels ignore `causal` once a window is given."""
    if window is None:
        return None, None
    return window - 1, 0 if causal else None


def _kernel(device: torch.device) -> Kernel:
    if device.type != "cuda":
        return reference_attention
    return flash_attn_attention if _flash_attn_installed() else torch_attention


def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _check(query: torch.Tensor, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, object]) -> None:
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"flash takes a (batch, keys) padding mask, got {mask.dim()} dimensions; use sdpa for trees and other masks."
        )
    if dropout:
        raise ValueError(f"flash is for inference and has no dropout, got {dropout}; use sdpa to train.")
    asked = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if asked:
        raise ValueError(f"flash does not support {', '.join(asked)}; use sdpa or eager.")
    if query.device.type != "cuda":
        return
    if query.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"flash needs float16 or bfloat16, got {query.dtype}; load the model in one of them."
        )
    if query.shape[-1] % 8 or query.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"flash needs a head_dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {query.shape[-1]}; use sdpa."
        )


def _spans(mask: torch.Tensor | None, keys: int) -> list[Span] | None:
    """Returns each row's run of valid keys as (start, stop), or `None` where nothing is padded.

    Reading the mask makes the host wait for the device. All layers of a pass get the same tensor, so the answer is kept on it.
    """
    if mask is None:
        return None
    known = getattr(mask, "_flash_spans", None)
    if known is None:
        known = _read_spans(mask, keys)
        mask._flash_spans = known
    return None if all(span == (0, keys) for span in known) else list(known)


def _read_spans(mask: torch.Tensor, keys: int) -> list[Span]:
    if mask.shape[1] != keys:
        raise ValueError(
            f"flash got a mask over {mask.shape[1]} keys for {keys} keys; it takes no static cache."
        )
    valid = mask.bool()
    starts = valid.int().argmax(-1)
    counts = valid.sum(-1)
    stops = keys - valid.flip(-1).int().argmax(-1)
    gaps = (counts > 0) & (stops - starts != counts)
    rows = torch.stack([starts, stops, counts, gaps.int()]).T.tolist()
    if any(gap for _, _, _, gap in rows):
        raise ValueError("flash takes padding at the ends of a row alone; use sdpa for masks with gaps.")
    return [(start, stop) if count else (0, 0) for start, stop, count, _ in rows]
