"""Rows see exactly what the rules allow, the cache gets exactly the nodes, and the kernel is as exact as plain PyTorch.

On a CPU the kernel runs in Triton's interpreter. What a row sees is found out from the kernel itself: change a key and a value,
and see whose output changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from huggingface.transformers.integrations import row_attention as row_module
from huggingface.transformers.integrations import tree_attention as module
from huggingface.transformers.integrations.tree_attention import (
    AttentionWorkspace,
    StepRows,
    tree_attention,
    tree_attention_reference,
)
from huggingface.transformers.integrations.triton_support import interpreting, unavailable

from . import compile_check

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="no Triton")

SPLIT_SLOTS = 200  # enough keys for parts of their own


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    """Parts of so few keys that a small cache has several."""
    monkeypatch.setattr(module, "KEYS_PER_SPLIT", 64)
    monkeypatch.setattr(row_module, "LEAST_KEYS", 64)


def tree(*parents: list[int], streams: int = 0, carriers: int | None = None) -> StepRows:
    """Returns the rows of one tree per batch row, from the parent of every node; the root's is -1."""
    paths, depths = [], []
    for tree_parents in parents:
        bits: list[int] = []
        for node, parent in enumerate(tree_parents):
            bits.append((bits[parent] if parent >= 0 else 0) | 1 << node)
        paths.append([path - (path >> 63 << 64) for path in bits])
        depths.append([path.bit_count() - 1 for path in bits])
    return StepRows(
        nodes=len(parents[0]),
        streams=streams,
        ancestors=torch.tensor(paths, dtype=torch.int64, device=DEVICE),
        depths=torch.tensor(depths, dtype=torch.int32, device=DEVICE),
        carriers=carriers,
    )


def sequence(nodes: int, *anchors: int, streams: int = 0) -> StepRows:
    return StepRows(nodes, streams, anchors=torch.tensor(anchors, device=DEVICE) if anchors else None)


@dataclass
class Step:
    projected: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    rows: StepRows
    window: int | None = None
    scaling: float = 0.3
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    settled: bool = False

    def run(self, attention=tree_attention, workspace=None):
        """Returns output, keys and values after the step; the step itself stays as it is."""
        keys, values = (
            cache.clone(memory_format=torch.preserve_format) for cache in (self.keys, self.values)
        )
        out = attention(
            self.projected.clone(), keys, values, self.lengths, self.rows, self.scaling, self.window, workspace,
            rotary=self.rotary, settled=self.settled,
        )  # fmt: skip
        return out, keys, values

    def to(self, dtype: torch.dtype) -> Step:
        return replace(
            self,
            projected=self.projected.to(dtype),
            keys=self.keys.to(dtype),
            values=self.values.to(dtype),
        )

    def assert_like_reference(self) -> None:
        # The order of a sum is the processor's own, in the reference too: 2.6e-6 was seen with heads of 128.
        for got, expected in zip(self.run(), self.run(tree_attention_reference), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def step(rows, lengths, heads=1, kv_heads=1, head_dim=16, slots=40, dtype=torch.float32, window=None) -> Step:
    generator = torch.Generator().manual_seed(len(lengths) * 1000 + rows.total)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    batch = len(lengths)
    return Step(
        projected=random(batch, rows.total, (heads + 2 * kv_heads) * head_dim),
        # Heads inside slots, then the reverse: strides are the cache's business.
        keys=random(batch, slots, kv_heads, head_dim).transpose(1, 2),
        values=random(batch, kv_heads, slots, head_dim),
        lengths=torch.tensor(lengths, device=DEVICE),
        rows=rows,
        window=window,
    )


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).flatten(2).any(-1)[0].nonzero().flatten().tolist()


def rows_that_see(original: Step, row: int) -> list[int]:
    """Returns the rows whose output changes with the key and the value of a row; one head."""
    head_dim = original.keys.shape[-1]
    projected = original.projected.clone()
    projected[:, row, head_dim:] += 1
    return changed(original.run()[0], replace(original, projected=projected).run()[0])


def committed_rows_seen(original: Step, row: int) -> list[int]:
    """Returns the slots whose values matter to a row; one head, one batch row."""
    seen = []
    for slot in range(original.keys.shape[2]):
        values = original.values.clone()
        values[:, :, slot] += 1
        if row in changed(original.run()[0], replace(original, values=values).run()[0]):
            seen.append(slot)
    return seen


def test_siblings_do_not_see_each_other():
    one = step(tree([-1, 0, 0, 1, 2]), [3])
    assert rows_that_see(one, 1) == [1, 3]
    assert rows_that_see(one, 2) == [2, 4]


def test_a_node_sees_its_ancestors_only():
    one = step(tree([-1, 0, 1, 2, 1]), [3])
    assert [rows_that_see(one, row) for row in range(5)] == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3], [3], [4]]


def test_a_stream_sees_its_node_and_the_streams_before_it():
    one = step(tree([-1, 0, 0], streams=2), [3])
    # Rows 3 and 4 are the streams of node 0, 5 and 6 of node 1, 7 and 8 of node 2.
    assert rows_that_see(one, 0) == list(range(9))
    assert rows_that_see(one, 1) == [1, 5, 6]
    assert rows_that_see(one, 2) == [2, 7, 8]
    assert [rows_that_see(one, row) for row in (3, 4, 5, 6)] == [[3, 4], [4], [5, 6], [6]]


def test_some_nodes_carry_streams():
    one = step(tree([-1, 0, 0, 1], streams=2, carriers=2), [3])
    # Rows 4 and 5 are the streams of node 0, 6 and 7 of node 1; nodes 2 and 3 have none.
    assert [rows_that_see(one, row) for row in (0, 1, 3)] == [list(range(8)), [1, 3, 6, 7], [3]]
    assert [rows_that_see(one, row) for row in (4, 5, 6, 7)] == [[4, 5], [5], [6, 7], [7]]


def test_a_sequence_is_causal_and_its_streams_hang_on_the_anchor():
    one = step(sequence(4, 2, streams=2), [3])
    assert [rows_that_see(one, row) for row in range(6)] == [
        [0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [2, 3, 4, 5],
        [3],
        [4, 5],
        [5],
    ]


def test_committed_rows_are_seen_up_to_the_length():
    assert committed_rows_seen(step(tree([-1, 0]), [3], slots=6), 1) == [0, 1, 2]


def test_the_window_counts_positions():
    """Node 2 is the root's child: it stands at position 6 although it is row 2; its stream stands at 7."""
    one = step(tree([-1, 0, 0, 1], streams=1), [5], slots=12, window=4)
    assert committed_rows_seen(one, 1) == committed_rows_seen(one, 2) == [3, 4]
    assert committed_rows_seen(one, 3) == committed_rows_seen(one, 6) == [4]
    assert committed_rows_seen(one, 7) == []


def test_the_window_hides_far_ancestors():
    chain = step(tree([-1, 0, 1, 2], streams=2), [5], window=2)
    assert rows_that_see(chain, 0) == [0, 1, 4]  # node 1 and stream 1 of node 0 are one position further
    assert rows_that_see(chain, 4) == [4, 5]
    assert rows_that_see(step(sequence(5), [2], window=3), 1) == [1, 2, 3]
    # Node 2 stands at depth 1, its child at depth 2: out of reach, though by row it would not be.
    assert rows_that_see(step(tree([-1, 0, 0, 2]), [5], window=1), 2) == [2]


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("lengths", [[0, 130, 200], [63, 197, 1]])
def test_ragged_lengths(lengths, window):
    trees = tree([-1, 0, 0, 1], [-1, 0, 1, 2], [-1, 0, 0, 0], streams=1)
    step(trees, lengths, slots=SPLIT_SLOTS, window=window).assert_like_reference()
    step(sequence(1), lengths, slots=SPLIT_SLOTS, window=window).assert_like_reference()
    step(sequence(6, 5, 0, 3, streams=3), lengths, slots=SPLIT_SLOTS, window=window).assert_like_reference()


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_grouped_heads(group):
    rows = tree([-1, 0, 0, 1, 1, 2, 5], streams=2)
    step(rows, [90], heads=2 * group, kv_heads=2, slots=SPLIT_SLOTS).assert_like_reference()
    step(sequence(1), [90], heads=2 * group, kv_heads=2, slots=SPLIT_SLOTS).assert_like_reference()


@pytest.mark.parametrize("group", [1, 3, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_queries_and_keys_are_rotated(group, shared):
    """Part of a head's columns turn with a partner in its other half; so do those of the key that the cache gets."""
    for rows in (sequence(1), tree([-1, 0, 0], [-1, 0, 1], streams=2)):
        one = step(rows, [150, 3], 2 * group, 2, 80, slots=SPLIT_SLOTS)
        angles = torch.arange(160 * rows.total).view(2, rows.total, 80)[: 1 if shared else 2].to(DEVICE)
        rotated = replace(one, rotary=(angles.cos(), angles.sin()))
        rotated.assert_like_reference()
        assert not torch.allclose(rotated.run()[0], one.run()[0], atol=1e-3)
        half = rotated.to(torch.float16)
        exact = half.to(torch.float32).run(tree_attention_reference)
        plain = half.run(tree_attention_reference)
        for got, rounded, expected in zip(half.run(), plain, exact, strict=True):
            assert (got - expected).abs().max() <= 2 * (rounded - expected).abs().max()


def test_reading_the_cache_early_changes_nothing():
    one = step(sequence(1), [150, 3], 2, 2, slots=SPLIT_SLOTS)
    for early, late in zip(replace(one, settled=True).run(), one.run(), strict=True):
        assert torch.equal(early, late)


@pytest.mark.parametrize(
    "dtype, share", [(torch.float16, 1.0), (torch.bfloat16, 2.0 if interpreting() else 1.0)]
)
def test_a_row_in_half_precision(dtype, share):
    """Sums are float32, so less is lost than by plain half precision; the interpreter cuts bfloat16 off, which doubles a loss."""
    angles = torch.arange(128.0, device=DEVICE).view(2, 1, 64)
    got, plain = 0.0, 0.0
    for lengths in ([150, 7], [90, 130], [199, 30], [64, 65]):
        one = step(sequence(1), lengths, 2, 2, 64, slots=SPLIT_SLOTS, dtype=dtype)
        one = replace(one, rotary=(angles.cos(), angles.sin()))
        exact = one.to(torch.float32).run(tree_attention_reference)[0]
        got += (one.run()[0] - exact).square().sum().item()
        plain += (one.run(tree_attention_reference)[0] - exact).square().sum().item()
    assert got**0.5 <= share * plain**0.5


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
def test_head_dims(head_dim):
    rows = tree([-1, 0, 0, 1], streams=1)
    step(rows, [90], 2, 1, head_dim, slots=SPLIT_SLOTS).assert_like_reference()
    step(sequence(40), [30], 1, 1, head_dim, slots=80).assert_like_reference()


@pytest.mark.parametrize("window", [None, 50])
def test_many_rows(window):
    """More rows and keys than one block holds, and a sixty-fourth node, whose bit is the sign."""
    parents = [-1, *(node // 2 for node in range(63))]
    step(tree(parents, streams=2), [100], 3, 1, slots=SPLIT_SLOTS, window=window).assert_like_reference()
    step(
        sequence(150, 149, 70, streams=3), [0, 20], 2, 1, slots=SPLIT_SLOTS, window=window
    ).assert_like_reference()


@pytest.mark.parametrize("rows", [tree([-1, 0, 0], streams=2), sequence(3, 1, streams=2)])
@pytest.mark.parametrize("length", [0, 4, 7, 9, 10])
def test_the_cache_gets_the_nodes_and_nothing_else(rows, length):
    one = step(rows, [length], heads=4, kv_heads=2, slots=10)
    _, keys, values = one.run()
    fresh = one.projected[0].unflatten(-1, (8, 16))[:3]
    for before, after, nodes in ((one.keys, keys, fresh[:, 4:6]), (one.values, values, fresh[:, 6:])):
        expected = before.clone()
        for row in range(min(3, 10 - length)):
            expected[0, :, length + row] = nodes[row]
        assert torch.equal(after, expected)


@st.composite
def trees(draw):
    nodes, batch = draw(st.integers(1, 20)), draw(st.integers(1, 2))
    parents = [[-1, *(draw(st.integers(0, node - 1)) for node in range(1, nodes))] for _ in range(batch)]
    lengths = [draw(st.integers(0, SPLIT_SLOTS)) for _ in range(batch)]
    window = draw(st.none() | st.integers(1, SPLIT_SLOTS))
    group = draw(st.integers(1, 3))
    rows = tree(*parents, streams=draw(st.integers(0, 3)), carriers=draw(st.none() | st.integers(1, nodes)))
    return step(rows, lengths, group, 1, slots=SPLIT_SLOTS, window=window)


@settings(max_examples=25, deadline=None)
@given(trees())
def test_random_trees(random_step):
    random_step.assert_like_reference()


@pytest.mark.parametrize("rows", [sequence(1), tree([-1, 0, 0, 1], streams=2), sequence(40, 39, streams=2)])
def test_float32_is_close_to_float64(rows):
    """The plain float32 computation loses about 1e-6 here."""
    one = step(rows, [150], 2, 1, head_dim=64, slots=SPLIT_SLOTS)
    exact = one.to(torch.float64).run(tree_attention_reference)[0]
    torch.testing.assert_close(one.run()[0].double(), exact, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("rows", [sequence(1), tree([-1, 0, 0, 1], streams=2), sequence(70, 39, streams=2)])
def test_float16_loses_at_most_twice_what_plain_float16_loses(rows):
    one = step(rows, [150], 2, 1, head_dim=64, slots=SPLIT_SLOTS, dtype=torch.float16)
    exact = one.to(torch.float32).run(tree_attention_reference)[0]
    loss = (one.run(tree_attention_reference)[0] - exact).abs().max()
    assert (one.run()[0] - exact).abs().max() <= 2 * loss


def test_one_workspace_serves_every_step_and_is_left_clean():
    workspace = AttentionWorkspace.for_step(2, 40, 2, 2, 16, SPLIT_SLOTS, DEVICE)
    for rows in (sequence(40), sequence(1), tree([-1, 0], [-1, 0], streams=2), sequence(1)):
        one = step(rows, [150, 3], 2, 2, slots=SPLIT_SLOTS)
        workspace.partials.fill_(math.nan)  # whatever an earlier step left
        assert torch.equal(one.run(workspace=workspace)[0], one.run()[0])
        assert not workspace.arrivals.any()


def test_keys_are_split_only_where_there_are_many():
    def parts(rows, slots):
        return module._partition(module._Size(1, rows, 1, 1, 16, slots, 4, torch.device("cpu"))).parts

    assert parts(2, 63) == 1
    assert parts(2, SPLIT_SLOTS) > 2
    assert parts(5000, SPLIT_SLOTS) == 1
    cpu = torch.device("cpu")
    assert row_module.choose_parts(1, 63, cpu) == 1
    assert row_module.choose_parts(1, SPLIT_SLOTS, cpu) > 1
    assert row_module.choose_parts(1000, SPLIT_SLOTS, cpu) == 1


def test_a_row_that_sees_nothing_gives_zeros():
    rows = tree([-1, 0])
    rows.ancestors.zero_()
    for attention in (tree_attention, tree_attention_reference):
        assert not step(rows, [0]).run(attention)[0].any()


def test_writes_to_the_buffer_given():
    one = step(sequence(2), [5])
    out = one.projected.new_full((1, 2, 16), math.nan)
    got = tree_attention(
        one.projected, one.keys.clone(), one.values.clone(), one.lengths, one.rows, 0.3, out=out
    )
    assert got is out
    torch.testing.assert_close(out, one.run(tree_attention_reference)[0])


def test_without_triton_the_reference_runs(monkeypatch):
    one = step(tree([-1, 0, 0], streams=1), [5])
    monkeypatch.setattr(module, "unavailable", lambda device: "no Triton")
    for got, expected in zip(one.run(), one.run(tree_attention_reference), strict=True):
        assert torch.equal(got, expected)


def test_faults_are_named():
    one = step(sequence(3), [5], slots=SPLIT_SLOTS)
    with pytest.raises(ValueError, match="does not fit 2 rows"):
        replace(one, rows=sequence(2)).run()
    small = AttentionWorkspace(torch.empty(0, device=DEVICE), torch.empty(0, device=DEVICE))
    with pytest.raises(ValueError, match="for_step"):
        one.run(workspace=small)
    with pytest.raises(ValueError, match="at most 64 nodes, got 65"):
        StepRows(65, ancestors=torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="no anchors"):
        sequence(3, streams=2)
    for carriers in (0, 3):
        with pytest.raises(ValueError, match=f"some of the 2 nodes of a tree, got {carriers}"):
            tree([-1, 0], streams=2, carriers=carriers)


STRIDES = [
    f"{cache}_{dimension}_stride" for cache in ("key", "value") for dimension in ("batch", "head", "slot")
]
SHAPES = {"1 node": (1, True, 4), "nodes": (33, True, 0), "tree": (33, True, 4), "sequence": (256, False, 4)}


def kernel_for(kind: str, head_dim: int, shape: str, group: int = 1, window: int = 0) -> tuple:
    """Returns what `compile_kernels` takes, as the dispatcher would launch it for 16 kv heads over 2048 slots."""
    itemsize = 4 if kind == "fp32" else 2
    nodes, is_tree, streams = SHAPES[shape]
    rows = nodes * (1 + streams) if is_tree else nodes + streams
    size = module._Size(1, rows, 16 * group, 16, head_dim, 2048, itemsize, torch.device("cpu"))
    partition = module._partition(size)
    block_keys, warps, stages = module._tiles(partition.block_rows, head_dim, itemsize)
    pointers = dict.fromkeys(("projected", "keys", "values", "out"), f"*{kind}")
    pointers |= {"lengths": "*i64", "ancestors": "*i64", "depths": "*i32", "anchors": "*i64"}
    pointers |= {"partials": "*fp32", "arrivals": "*i32"}
    constants = {
        "TREE": is_tree, "STREAMS": streams, "WINDOW": window, "GROUP": group, "HEAD_DIM": head_dim,
        "WIDTH": module.padded(head_dim), "PARTS": 2 if shape == "sequence" else 8, "BLOCK_M": partition.block_rows,
        "BLOCK_N": block_keys,
    }  # fmt: skip
    absent = {"anchors"} if is_tree else {"ancestors", "depths"} | (set() if streams else {"anchors"})
    constants |= dict.fromkeys(absent) | ({"nodes": 1} if nodes == 1 else {})
    numbers = dict.fromkeys(("nodes", "rows", "slots", *STRIDES), "i32") | {"scale": "fp32"}
    place = "huggingface.transformers.integrations.tree_attention_kernel"
    return place, "tree_attention_kernel", pointers | numbers, constants, warps, stages, STRIDES


def row_kernel_for(kind: str, head_dim: int, window: int = 0, settled: bool = True, parts: int = 16) -> tuple:
    """Returns what `compile_kernels` takes for one row, as the launcher has it."""
    block, warps = row_module.tile(4 if kind == "fp32" else 2)
    pointers = dict.fromkeys(("projected", "keys", "values", "out"), f"*{kind}")
    pointers |= {"cos": "*fp32", "sin": "*fp32", "lengths": "*i64", "partials": "*fp32", "arrivals": "*i32"}
    constants = {
        "ROTARY": not window, "WINDOW": window, "GROUP": 1, "HEAD_DIM": head_dim, "WIDTH": module.padded(head_dim),
        "PARTS": parts, "SETTLED": settled, "BLOCK": block, "cos_batch_stride": 0, "sin_batch_stride": 0,
    }  # fmt: skip
    numbers = dict.fromkeys(("slots", *STRIDES), "i32") | {"scale": "fp32"}
    place = "huggingface.transformers.integrations.row_attention"
    return place, "row_attention_kernel", pointers | numbers, constants, warps, 3, STRIDES


def assert_fits(kernels: list[tuple], capabilities=(80, 86, 90)) -> None:
    for kernel, usages in zip(kernels, compile_check.compile_kernels(kernels, capabilities), strict=True):
        for usage in usages:
            assert usage.fits, (kernel, usage)


def test_compiles_without_spills():
    """The narrowest cases: most columns, most rows, least shared memory; all others are slow to compile."""
    assert_fits(
        [kernel_for(kind, 128, shape) for kind in ("bf16", "fp32") for shape in ("nodes", "tree")], (86, 90)
    )
    assert_fits([row_kernel_for(kind, 128) for kind in ("bf16", "fp32")])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_every_kind_compiles_without_spills(kind):
    kernels = [kernel_for(kind, head_dim, shape) for head_dim in (64, 80, 128) for shape in SHAPES]
    kernels += [kernel_for(kind, 64, shape, window=256) for shape in SHAPES]
    kernels += [kernel_for(kind, 80, shape, window=256) for shape in SHAPES]
    kernels += [kernel_for(kind, 128, shape, group=3) for shape in SHAPES]
    kernels += [row_kernel_for(kind, head_dim, window) for head_dim in (64, 80, 128) for window in (0, 256)]
    kernels += [row_kernel_for(kind, 128, settled=False, parts=1)]
    assert_fits(kernels)
