"""Input states of a step's rows: one launch gives what plain operations give."""

from __future__ import annotations

import pytest
import torch

from huggingface.transformers.integrations.row_inputs import (
    embed_nodes,
    embed_nodes_reference,
    start_streams,
    start_streams_reference,
)
from huggingface.transformers.integrations.triton_support import unavailable

from .compile_check import compile_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLACE = "huggingface.transformers.integrations.row_inputs"
needs_kernels = pytest.mark.skipif(unavailable(DEVICE) is not None, reason="Triton cannot run here")

LIMIT = 40


@needs_kernels
@pytest.mark.parametrize("embeds_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("batch, nodes, features", [(1, 1, 16), (3, 5, 24), (2, 32, 1030)])
def test_nodes_are_embedded_at_their_positions(batch, nodes, features, dtype, embeds_positions):
    """Also of a sequence whose tree reaches past the last position."""
    torch.manual_seed(nodes)
    tokens = torch.randint(99, (batch, nodes)).to(DEVICE)
    lengths = torch.tensor([LIMIT - 3, 0, 7][:batch], device=DEVICE)
    depths = torch.randint(6, (batch, nodes), dtype=torch.int32).to(DEVICE)
    tables = [torch.randn(rows, features).to(DEVICE, dtype) for rows in (99, LIMIT)][: 1 + embeds_positions]
    hidden, positions = embed_nodes(tokens, lengths, depths, LIMIT, *tables)
    expected, places = embed_nodes_reference(tokens, lengths, depths, LIMIT, *tables)
    assert torch.equal(hidden, expected)
    assert torch.equal(positions, places)
    assert positions.max() <= LIMIT - 1


def test_positions_are_lengths_and_depths():
    tokens, table = torch.tensor([[2, 0]], device=DEVICE), torch.arange(6.0, device=DEVICE).view(3, 2)
    depths = torch.tensor([[0, 3]], dtype=torch.int32, device=DEVICE)
    hidden, positions = embed_nodes(tokens, torch.tensor([5], device=DEVICE), depths, 8, table)
    assert (hidden.tolist(), positions.tolist()) == ([[[4.0, 5.0], [0.0, 1.0]]], [[5, 7]])


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "batch, nodes, features, streams, carriers", [(1, 1, 16, 1, 1), (2, 5, 1030, 3, 2), (1, 8, 24, 4, 8)]
)
def test_streams_start_beside_their_nodes(batch, nodes, features, streams, carriers, dtype):
    torch.manual_seed(nodes)
    hidden = torch.randn(batch, nodes, features).to(DEVICE, dtype)
    offsets = torch.randn(streams, features).to(DEVICE, dtype)
    rows = start_streams(hidden, offsets, carriers)
    assert torch.equal(rows, start_streams_reference(hidden, offsets, carriers))


def test_the_streams_of_a_node_lie_side_by_side():
    hidden = torch.tensor([[[10.0], [20.0], [30.0]]], device=DEVICE)
    rows = start_streams(hidden, torch.tensor([[1.0], [2.0]], device=DEVICE), 2)
    assert rows.flatten().tolist() == [10.0, 20.0, 30.0, 11.0, 12.0, 21.0, 22.0]


def test_kernels_compile_without_spills():
    pytest.importorskip("triton")
    integers = {"tokens": "*i64", "lengths": "*i64", "depths": "*i32", "positions": "*i64"}
    sizes = dict.fromkeys(("nodes", "limit", "features", "streams"), "i32")
    kernels = []
    for kind in ("bf16", "fp32"):
        floats = dict.fromkeys(("token_table", "position_table", "hidden", "offsets", "rows"), f"*{kind}")
        for name, constants in (("_embed_kernel", {"HAS_POSITIONS": True}), ("_start_kernel", {})):
            kernels.append((PLACE, name, integers | floats | sizes, {**constants, "BLOCK": 1024}, 4, 3, ()))
    for kernel, usages in zip(kernels, compile_kernels(kernels), strict=True):
        assert all(usage.fits for usage in usages), (kernel[1], usages)
