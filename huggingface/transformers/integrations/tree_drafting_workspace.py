"""Sizes of the kernels of :mod:`.tree_drafting`, and the memory through which they pass on what they find.

Every size that a kernel is compiled for follows from here; what was measured to be fastest stands in the constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .top_tokens import floats_needed

LARGEST_BEAM = 8
"""Children of a node, and nodes whose children are scored, at most: candidates that a descent compares with each other."""
SMALL_VOCABULARY = 16384
"""Up to here small blocks keep all processors busy; beyond, larger blocks leave fewer maxima to compare."""
SMALL_BLOCK, LARGE_BLOCK = 64, 512
"""Tokens that one program scores, in small and in large vocabularies."""
SMALL_GROUP, LARGE_GROUP = 64, 32
"""Tokens whose maximum is kept, likewise; a small block is one group."""
SMALL_WARPS, LARGE_WARPS, SELECTION_WARPS = 8, 8, 8
"""Warps of a program that scores a small block, a large one, and of the program that selects the tree."""


@dataclass(frozen=True)
class DraftWorkspace:
    """What the kernels pass from one program to another, and from one level to the next.

    A row of the pool is one level's candidates, best first; the places behind `keep` stay empty.

    Attributes:
        beam: parents expanded a level, and tokens of each.
        keep: candidates of a level that are kept.
        scored: (2, batch, parents, floats) float32 scores of every token and the maxima above them (:mod:`.top_tokens`), two
            levels in turn; 8 parents, the least of a tensor core, whatever the beam.
        parts: (2, batch, parents, blocks) float32 each block's log-sum-exp.
        sums: (batch, streams, slots) float32 pool: log-probabilities summed from the root, -inf for none.
        tokens: (batch, streams, slots) int32 pool: tokens.
        parents: (batch, streams, slots) int32 pool: place of the parent in the row's flattened pool, -1 for the root.
        best: (batch, streams) int64 keys of each level's best token, where the tree is a chain (:mod:`.chain_drafting`); the
            lowest between steps.
    """

    beam: int
    keep: int
    scored: torch.Tensor
    parts: torch.Tensor
    sums: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor
    best: torch.Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        streams: int,
        vocab: int,
        beam: int,
        nodes: int,
        device: torch.device | str = "cpu",
        continued: bool = True,
    ) -> DraftWorkspace:
        """Returns the workspace of :func:`.tree_drafting.draft_tree`.

        Args:
            batch: sequences.
            streams: levels drafted by streams.
            vocab: tokens of the vocabulary.
            beam: parents expanded a level, and tokens of each.
            nodes: nodes of the tree.
            device: where the trees are made.
            continued: whether a continuation from the context may join; without one a beam of one is a chain, which needs little.

        Raises:
            ValueError: `beam` is not in 1 .. 8, or there are no streams.
        """
        if not 1 <= beam <= LARGEST_BEAM:
            raise ValueError(f"beam must be 1 to {LARGEST_BEAM}, got {beam}.")
        if streams < 1:
            raise ValueError(f"drafting needs at least one stream, got {streams}.")
        sizes = kernel_sizes(beam, nodes, streams, vocab)
        parents = sizes["PARENTS"] if continued or beam > 1 else 0
        blocks = sizes["BLOCKS"]
        pool = (batch, streams, sizes["SLOTS"])

        def empty(*shape: int, dtype: torch.dtype, fill: float = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        return cls(
            beam=beam,
            keep=sizes["KEEP"],
            scored=empty(2, batch, parents, sizes["FLOATS"], dtype=torch.float32, fill=float("-inf")),
            parts=empty(2, batch, parents, blocks, dtype=torch.float32, fill=float("-inf")),
            sums=empty(*pool, dtype=torch.float32, fill=float("-inf")),
            tokens=empty(*pool, dtype=torch.int32),
            parents=empty(*pool, dtype=torch.int32, fill=-1),
            best=empty(batch, streams, dtype=torch.int64, fill=-(2**63)),
        )


def block_warps(block: int) -> int:
    """Returns the warps of a program that scores a block."""
    return SMALL_WARPS if block <= SMALL_BLOCK else LARGE_WARPS


def level_stages(rank: int) -> int:
    """Returns the stages of a level's pipeline; three of more than 128 features exceed the 99 KB of sm_86."""
    return 2 if padded_rank(rank) > 128 else 3


def kernel_sizes(beam: int, nodes: int, streams: int, vocab: int) -> dict[str, int]:
    """Returns the constants that both kernels have in common."""
    width = max(2, next_power_of_two(beam))
    keep = min(max(nodes - 1, beam), width * width)
    small = vocab <= SMALL_VOCABULARY
    block, group = (SMALL_BLOCK, SMALL_GROUP) if small else (LARGE_BLOCK, LARGE_GROUP)
    blocks = -(-vocab // block)
    return {
        "STREAMS": streams,
        "BEAM": beam,
        "KEEP": keep,
        "SLOTS": next_power_of_two(keep + 1),
        "PARENTS": 8,  # the least of a tensor core
        "WIDTH": width,
        "BLOCK": block,
        "GROUP": group,
        "BLOCKS": blocks,
        "PADDED": max(width, next_power_of_two(blocks)),
        "FLOATS": floats_needed(blocks, block, group),
    }


def next_power_of_two(number: int) -> int:
    """Returns the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def padded_rank(rank: int) -> int:
    """Returns the rank as the kernels take it: a power of two that `tl.dot` accepts, 0 for none."""
    return max(16, next_power_of_two(rank)) if rank else 0
