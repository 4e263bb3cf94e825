"""Attention of a single new row a sequence: a step of plain decoding.

One query leaves the tensor cores nothing to do, and the keys of a few hundred tokens are read in less time than a kernel takes to
start. So nothing is staged in shared memory: a program asks for the keys and values of its part at once, in registers, and where
the step allows it before the kernel in front has made the query. Rotary embedding is applied on the way: to the query in every
program, to the new key in the one that writes it.

A program has one query head. Heads that share a key head read it again, but find it in the second-level cache.

`tree_attention.py` tells how parts are merged, and uses this kernel for steps of one row.
"""

from __future__ import annotations

from functools import cache

import torch

from .triton_support import jit, overlaps_launches, release_dependents, tl, wait_for_inputs

INTERPRETED_PROCESSORS = 16
"""Stands in for the number of multiprocessors in the interpreter, whose programs run one after the other."""
LEAST_KEYS, MOST_PARTS = 32, 16
"""Keys that are worth a part at full capacity, and parts that one program merges."""
PROGRAMS = 4
"""Programs of a multiprocessor at most, on average: they are small."""
MOST_READ_AGAIN = 4096
"""Slots of a cache up to which heads that share a key head read it each for themselves. At 3,900 keys that was still faster
than the trees' kernel (15.4 us against 16.5 for 32 heads on 8, H200); longer ones were not tried."""


@cache
def processors(device: torch.device) -> int:
    """Returns the multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded(head_dim: int) -> int:
    """Returns the power of two that covers a head."""
    return max(16, 1 << (head_dim - 1).bit_length())


def serves(group: int, slots: int) -> bool:
    """Returns whether this kernel is the one for `group` query heads a key head and a cache of so many slots."""
    return group == 1 or slots <= MOST_READ_AGAIN


def tile(itemsize: int) -> tuple[int, int]:
    """Returns the keys that a program holds at a time, with as many on their way, and its warps.

    32 keys, 2 warps and up to 16 parts were among the fastest of a dozen settings in a step at GPT-Neo-1.3B's and 125M's shapes
    (H200, 320 keys).
    """
    return (32, 4) if itemsize == 4 else (32, 2)


def choose_parts(heads: int, slots: int, device: torch.device) -> int:
    """Returns the parts that the query heads of all sequences divide `slots` keys into, a power of two."""
    room = min(PROGRAMS * processors(device) // heads, slots // LEAST_KEYS, MOST_PARTS)
    return 1 << (max(1, room).bit_length() - 1)


def workspace_sizes(heads: int, head_dim: int, slots: int, device: torch.device) -> tuple[int, int]:
    """Returns the arrival counters and the float32 numbers that a launch needs."""
    parts = choose_parts(heads, slots, device)
    return (heads, heads * parts * (padded(head_dim) + 2)) if parts > 1 else (0, 0)


def row_attention(
    projected: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    settled: bool,
    partials: torch.Tensor,
    arrivals: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Does what `tree_attention` does for one row a sequence, whose arguments these are but for `scale`, which holds log2(e)."""
    batch, kv_heads, slots, head_dim = keys.shape
    group = projected.shape[-1] // head_dim // kv_heads - 2
    parts = choose_parts(batch * kv_heads * group, slots, projected.device)
    block, warps = tile(projected.dtype.itemsize)
    cos, sin = (lengths, lengths) if rotary is None else rotary
    pdl = overlaps_launches(projected.device)
    row_attention_kernel[(parts, kv_heads * group, batch)](
        projected, keys, values, lengths, cos, sin, out, partials, arrivals, slots, scale,
        *keys.stride()[:3], *values.stride()[:3], *(one.stride(0) if one.shape[0] > 1 else 0 for one in (cos, sin)),
        ROTARY=rotary is not None, WINDOW=window or 0, GROUP=group, HEAD_DIM=head_dim, WIDTH=padded(head_dim), PARTS=parts,
        BLOCK=block, SETTLED=settled, PDL=pdl, num_warps=warps, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


@jit
def _head(pointer, cos_ptr, sin_ptr, column, inner, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns (1, WIDTH) float32 columns of a head; `ROTARY`: rotated, and rounded as stored ones are."""
    value = tl.load(pointer + column, mask=inner, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = HEAD_DIM // 2
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        other = tl.load(pointer + partner, mask=inner, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + column, mask=inner, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + column, mask=inner, other=0.0).to(tl.float32)
        turned = value.to(tl.float32) * cos + tl.where(column < HALF, -other, other) * sin
        value = turned.to(value.dtype)
    return value.to(tl.float32)


@jit
def _block(plane, stride, start, end, column, inner, BLOCK: tl.constexpr):
    """Returns (BLOCK, WIDTH) keys or values from slot `start` on, zeros from `end` on."""
    place = tl.arange(0, BLOCK)[:, None]
    at = plane + tl.cast(start, tl.int64) * stride + place * stride + column
    return tl.load(at, mask=(place < end - start) & inner, other=0.0)


@jit
def _absorb(query, key, value, visible, scale, maximum, total, accumulator):
    """Returns maximum, sum and unnormalised output after one more block of keys, as in `tree_attention_kernel`."""
    scores = tl.where(visible, tl.sum(key.to(tl.float32) * query, 1) * scale, float("-inf"))
    raised = tl.maximum(maximum, tl.max(scores, 0))
    origin = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - origin)
    fade = tl.exp2(maximum - origin)
    accumulator = accumulator * fade + tl.sum(weights[:, None] * value.to(tl.float32), 0)
    return raised, total * fade + tl.sum(weights, 0), accumulator


@jit
def _merge(partials, width, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the sum and the unnormalised output of all parts."""
    part = tl.arange(0, PARTS) * (WIDTH + 2)
    maxima = tl.load(partials + WIDTH + part, cache_modifier=".cg")
    totals = tl.load(partials + WIDTH + 1 + part, cache_modifier=".cg")
    outputs = tl.load(partials + part[:, None] + width[None, :], cache_modifier=".cg")
    # The part of the row's own key always has a maximum.
    fade = tl.exp2(maxima - tl.max(maxima, 0))
    return tl.sum(totals * fade, 0), tl.sum(outputs * fade[:, None], 0)


@jit
def row_attention_kernel(
    projected, keys, values, lengths, cos, sin, out, partials, arrivals, slots, scale,
    key_batch_stride, key_head_stride, key_slot_stride, value_batch_stride, value_head_stride, value_slot_stride,
    cos_batch_stride, sin_batch_stride,
    ROTARY: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attends one head of one sequence to one part of the committed keys. Grid: (parts, query heads, batch).

    Part 0 also has the row's own key; that of a group's first head writes it to the cache. `SETTLED`: keys are read before the
    kernel in front is done.
    """
    release_dependents(PDL)
    if not SETTLED:
        wait_for_inputs(PDL)
    part, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch_row = tl.program_id(2).to(tl.int64)
    kv_head, kv_heads = head // GROUP, heads // GROUP
    width = tl.arange(0, WIDTH)
    column = width[None, :]
    inner = column < HEAD_DIM
    key_plane = keys + batch_row * key_batch_stride + kv_head.to(tl.int64) * key_head_stride
    value_plane = values + batch_row * value_batch_stride + kv_head.to(tl.int64) * value_head_stride
    length = tl.load(lengths + batch_row).to(tl.int32)
    committed = tl.minimum(length, slots)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.minimum(tl.maximum(length - WINDOW + 1, 0), committed)
    span = tl.cdiv(committed - lowest, PARTS)
    first = lowest + part * span
    end = tl.minimum(first + span, committed)
    key = _block(key_plane, key_slot_stride, first, end, column, inner, BLOCK)
    value = _block(value_plane, value_slot_stride, first, end, column, inner, BLOCK)
    if SETTLED:
        wait_for_inputs(PDL)

    row = projected + batch_row * (heads + 2 * kv_heads) * HEAD_DIM
    cos += batch_row * cos_batch_stride
    sin += batch_row * sin_batch_stride
    query = _head(row + head * HEAD_DIM, cos, sin, column, inner, ROTARY, HEAD_DIM)
    maximum, total = float("-inf"), 0.0
    accumulator = tl.zeros([WIDTH], tl.float32)
    places = tl.arange(0, BLOCK)
    for start in range(first, end, BLOCK):
        # The next block is on its way while this one is computed.
        next_key = _block(key_plane, key_slot_stride, start + BLOCK, end, column, inner, BLOCK)
        next_value = _block(value_plane, value_slot_stride, start + BLOCK, end, column, inner, BLOCK)
        visible = places < end - start
        maximum, total, accumulator = _absorb(query, key, value, visible, scale, maximum, total, accumulator)
        key, value = next_key, next_value
    if part == 0:
        fresh = row + (heads + kv_head) * HEAD_DIM
        own_key = _head(fresh, cos, sin, column, inner, ROTARY, HEAD_DIM)
        own_value = _head(fresh + kv_heads * HEAD_DIM, cos, sin, column, inner, False, HEAD_DIM)
        seen = tl.zeros([1], tl.int32) == 0
        maximum, total, accumulator = _absorb(
            query, own_key, own_value, seen, scale, maximum, total, accumulator
        )
        kept = inner & (length < slots) & (head % GROUP == 0)
        slot = length.to(tl.int64)
        tl.store(key_plane + slot * key_slot_stride + column, own_key.to(keys.dtype.element_ty), mask=kept)
        tl.store(
            value_plane + slot * value_slot_stride + column, own_value.to(values.dtype.element_ty), mask=kept
        )

    out += (batch_row * heads + head) * HEAD_DIM + width
    complete = True
    if PARTS > 1:
        plane = batch_row * heads + head
        partials += plane * PARTS * (WIDTH + 2)
        numbers = partials + part * (WIDTH + 2)
        tl.store(numbers + width, accumulator)
        tl.store(numbers + WIDTH, maximum)
        tl.store(numbers + WIDTH + 1, total)
        tl.debug_barrier()
        complete = tl.atomic_add(arrivals + plane, 1, sem="acq_rel") == PARTS - 1
        if complete:
            total, accumulator = _merge(partials, width, PARTS, WIDTH)
            tl.store(arrivals + plane, 0)
    if complete:
        tl.store(out, (accumulator / total).to(out.dtype.element_ty), mask=width < HEAD_DIM)
