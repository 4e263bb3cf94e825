"""Attention of a single new row a sequence: a step of plain decoding.

One query leaves the tensor cores nothing to do, and the keys of a few hundred tokens are read in less time than a kernel takes to
start. So nothing is staged in shared memory: a program asks for the keys and values of its part at once, in registers, and where
the step allows it before the kernel in front has made the query. Rotary embedding is applied on the way: to the query in every
program, to the new key in the one that writes it.

How parts are merged is told in `tree_attention.py`, which uses this kernel for steps of one row.
"""

from __future__ import annotations

from functools import cache

import torch

from .triton_support import jit, overlaps_launches, release_dependents, tl, wait_for_inputs

INTERPRETED_PROCESSORS = 16
"""Stands in for the number of multiprocessors in the interpreter, whose programs run one after the other."""
LARGEST_GROUP = 4
"""Query heads of a key head beyond which their products are worth a tensor core."""
LEAST_KEYS, MOST_PARTS = 32, 16
"""Keys that are worth a part at full capacity, and parts that one program merges."""
WARPS = 4


@cache
def processors(device: torch.device) -> int:
    """Returns the multiprocessors of a device."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def serves(heads: int, kv_heads: int) -> bool:
    """Returns whether the kernel is made for so many query heads a key head."""
    return heads <= LARGEST_GROUP * kv_heads


def block_keys(itemsize: int, group: int) -> int:
    """Returns the keys that a program holds at a time: with the next ones, what registers have room for."""
    return 32 if itemsize == 4 or group > 2 else 64


def choose_parts(planes: int, slots: int, device: torch.device) -> int:
    """Returns the parts that `planes` (key heads of all sequences) divide `slots` keys into, a power of two."""
    room = min(2 * processors(device) // planes, slots // LEAST_KEYS, MOST_PARTS)
    return 1 << (max(1, room).bit_length() - 1)


def workspace_sizes(
    planes: int, group: int, head_dim: int, slots: int, device: torch.device
) -> tuple[int, int]:
    """Returns the arrival counters and the float32 numbers that a launch needs."""
    parts = choose_parts(planes, slots, device)
    if parts == 1:
        return 0, 0
    return planes, planes * parts * padded(group, 1) * (padded(head_dim, 16) + 2)


def padded(size: int, least: int) -> int:
    """Returns the power of two that covers a size."""
    return max(least, 1 << (size - 1).bit_length())


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
    parts = choose_parts(batch * kv_heads, slots, projected.device)
    cos, sin = (lengths, lengths) if rotary is None else rotary
    pdl = overlaps_launches(projected.device)
    row_attention_kernel[(parts, kv_heads, batch)](
        projected, keys, values, lengths, cos, sin, out, partials, arrivals, slots, scale,
        *keys.stride()[:3], *values.stride()[:3], *(one.stride(0) if one.shape[0] > 1 else 0 for one in (cos, sin)),
        ROTARY=rotary is not None, WINDOW=window or 0, GROUP=group, LINES=padded(group, 1), HEAD_DIM=head_dim,
        WIDTH=padded(head_dim, 16), PARTS=parts, BLOCK=block_keys(projected.dtype.itemsize, group), SETTLED=settled, PDL=pdl,
        num_warps=WARPS,
        **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


@jit
def _turned(value, other, cos_ptr, sin_ptr, column, inner, HALF: tl.constexpr):
    """Returns float32 columns of heads after rotation; `other` holds each column's partner."""
    cos = tl.load(cos_ptr + column, mask=inner, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + column, mask=inner, other=0.0).to(tl.float32)
    return value * cos + tl.where(column < HALF, -other, other) * sin


@jit
def _columns(pointer, at, column, inner, cos_ptr, sin_ptr, ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Returns float32 columns of heads that start `at` elements after a pointer, rotated and rounded as stored ones are."""
    value = tl.load(pointer + at + column, mask=inner, other=0.0)
    if ROTARY:
        HALF: tl.constexpr = HEAD_DIM // 2
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        other = tl.load(pointer + at + partner, mask=inner, other=0.0).to(tl.float32)
        turned = _turned(value.to(tl.float32), other, cos_ptr, sin_ptr, column, inner, HALF)
        value = turned.to(value.dtype)
    return value.to(tl.float32)


@jit
def _block(plane, stride, start, end, column, inner, BLOCK: tl.constexpr):
    """Returns (1, BLOCK, WIDTH) keys or values from slot `start` on, zeros from `end` on."""
    place = tl.arange(0, BLOCK)[None, :, None]
    at = plane + tl.cast(start, tl.int64) * stride + place * stride + column
    return tl.load(at, mask=(place < end - start) & inner, other=0.0)


@jit
def _absorb(query, key, value, visible, scale, maximum, total, accumulator):
    """Returns maximum, sum and unnormalised output after one more block of keys, as in `tree_attention_kernel`."""
    scores = tl.where(visible, tl.sum(key.to(tl.float32) * query, 2) * scale, float("-inf"))
    raised = tl.maximum(maximum, tl.max(scores, 1))
    origin = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - origin[:, None])
    fade = tl.exp2(maximum - origin)
    total = total * fade + tl.sum(weights, 1)
    accumulator = accumulator * fade[:, None] + tl.sum(weights[:, :, None] * value.to(tl.float32), 1)
    return raised, total, accumulator


@jit
def _merge(numbers, line, width, PARTS: tl.constexpr, LINES: tl.constexpr, WIDTH: tl.constexpr):
    """Returns the sum and the unnormalised output of all parts."""
    PART: tl.constexpr = LINES * (WIDTH + 2)
    part = tl.arange(0, PARTS)[:, None] * PART + line[None, :]
    maxima = tl.load(numbers + LINES * WIDTH + part, cache_modifier=".cg")
    totals = tl.load(numbers + LINES * (WIDTH + 1) + part, cache_modifier=".cg")
    at = tl.arange(0, PARTS)[:, None, None] * PART + line[None, :, None] * WIDTH + width[None, None, :]
    outputs = tl.load(numbers + at, cache_modifier=".cg")
    highest = tl.max(maxima, 0)
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2(maxima - origin[None, :])
    return tl.sum(totals * fade, 0), tl.sum(outputs * fade[:, :, None], 0)


@jit
def row_attention_kernel(
    projected, keys, values, lengths, cos, sin, out, partials, arrivals, slots, scale,
    key_batch_stride, key_head_stride, key_slot_stride, value_batch_stride, value_head_stride, value_slot_stride,
    cos_batch_stride, sin_batch_stride,
    ROTARY: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr, HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attends the query heads of one key head to one part of the committed keys. Grid: (parts, key heads, batch).

    Part 0 also has the row's own key, which it writes to the cache. `SETTLED`: keys are read before the kernel in front is done.
    """
    release_dependents(PDL)
    if not SETTLED:
        wait_for_inputs(PDL)
    part, kv_head, kv_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch_row = tl.program_id(2).to(tl.int64)
    line, width = tl.arange(0, LINES), tl.arange(0, WIDTH)
    column = width[None, None, :]
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

    row = projected + batch_row * kv_heads * (GROUP + 2) * HEAD_DIM
    cos += batch_row * cos_batch_stride
    sin += batch_row * sin_batch_stride
    # Lines past the group repeat its last head and are never stored.
    head = kv_head * GROUP + tl.minimum(line, GROUP - 1)
    query = _columns(row, (head * HEAD_DIM)[:, None, None], column, inner, cos, sin, ROTARY, HEAD_DIM)
    maximum = tl.full([LINES], float("-inf"), tl.float32)
    total = tl.zeros([LINES], tl.float32)
    accumulator = tl.zeros([LINES, WIDTH], tl.float32)
    places = tl.arange(0, BLOCK)[None, :]
    for start in range(first, end, BLOCK):
        # The next block is on its way while this one is computed.
        next_key = _block(key_plane, key_slot_stride, start + BLOCK, end, column, inner, BLOCK)
        next_value = _block(value_plane, value_slot_stride, start + BLOCK, end, column, inner, BLOCK)
        visible = places < end - start
        maximum, total, accumulator = _absorb(query, key, value, visible, scale, maximum, total, accumulator)
        key, value = next_key, next_value
    if part == 0:
        fresh = row + (kv_heads * GROUP + kv_head) * HEAD_DIM
        own_key = _columns(fresh, 0, column, inner, cos, sin, ROTARY, HEAD_DIM)
        own_value = _columns(fresh, kv_heads * HEAD_DIM, column, inner, cos, sin, False, HEAD_DIM)
        seen = tl.zeros([1, 1], tl.int32) == 0
        maximum, total, accumulator = _absorb(
            query, own_key, own_value, seen, scale, maximum, total, accumulator
        )
        kept = inner & (length < slots)
        slot = length.to(tl.int64)
        kind = keys.dtype.element_ty
        tl.store(key_plane + slot * key_slot_stride + column, own_key.to(kind), mask=kept)
        tl.store(value_plane + slot * value_slot_stride + column, own_value.to(kind), mask=kept)

    stored = (line < GROUP)[:, None] & (width < HEAD_DIM)[None, :]
    out += (batch_row * kv_heads * GROUP + head)[:, None] * HEAD_DIM + width[None, :]
    if PARTS > 1:
        plane = batch_row * kv_heads + kv_head
        partials += plane * PARTS * LINES * (WIDTH + 2)
        numbers = partials + part * LINES * (WIDTH + 2)
        tl.store(numbers + line[:, None] * WIDTH + width[None, :], accumulator)
        tl.store(numbers + LINES * WIDTH + line, maximum)
        tl.store(numbers + LINES * (WIDTH + 1) + line, total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals + plane, 1, sem="acq_rel") == PARTS - 1:
            total, accumulator = _merge(partials, line, width, PARTS, LINES, WIDTH)
            tl.store(out, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=stored)
            tl.store(arrivals + plane, 0)
    else:
        tl.store(out, (accumulator / total[:, None]).to(out.dtype.element_ty), mask=stored)
