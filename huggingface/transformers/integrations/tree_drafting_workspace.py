"""Sizes of the kernels of :mod:`.tree_drafting`, and the memory through which they pass on what they find.

Every size that a kernel is compiled for follows from here; what was measured to be fastest stands in the constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TABLE_BYTES = 64 * 1024
"""Bytes of the token table that one program holds in shared memory (100 KB on the smallest GPU the kernels run on)."""
LARGEST_BEAM = 16
"""Children of a node, and nodes whose children are scored, at most: what a thread sorts in registers."""
SMALL_VOCABULARY = 16384
"""Up to here small blocks keep all processors busy; beyond, larger blocks leave fewer lists to merge."""
SMALL_BLOCK, LARGE_BLOCK = 128, 512
"""Tokens that one program scores, in small and in large vocabularies."""
SMALL_WARPS, LARGE_WARPS, SELECTION_WARPS = 8, 8, 8
"""Warps of a program that scores a small block, a large one, and of the program that selects the tree."""
NO_KEY = -0x7FFFFFFFFFFFFFFF
"""Below all keys of tokens."""
MERGED_KEYS = 256
"""Keys of a parent that are merged at a time: a list of 8 for each thread of a warp; with longer lists registers run out."""


@dataclass(frozen=True)
class DraftWorkspace:
    """What the kernels pass from one program to another, and from one level to the next.

    A row of the pool is one level's candidates, best first; the places behind `keep` stay empty.

    Attributes:
        beam: parents expanded a level, and tokens of each.
        keep: candidates of a level that are kept.
        block: tokens of the vocabulary that one program scores.
        keys: (2, batch, parents, width, blocks) int64 best candidates of each block and parent, two levels in turn; parents
            and width are `beam` and blocks are the blocks of the vocabulary, rounded up to powers of two.
        parts: (2, batch, parents, blocks) float32 each block's log-sum-exp.
        sums: (batch, streams, slots) float32 pool: log-probabilities summed from the root, -inf for none.
        tokens: (batch, streams, slots) int32 pool: tokens.
        parents: (batch, streams, slots) int32 pool: place of the parent in the row's flattened pool, -1 for the root.
    """

    beam: int
    keep: int
    block: int
    keys: torch.Tensor
    parts: torch.Tensor
    sums: torch.Tensor
    tokens: torch.Tensor
    parents: torch.Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        streams: int,
        vocab: int,
        beam: int,
        nodes: int,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> DraftWorkspace:
        """Returns the workspace of :func:`.tree_drafting.draft_tree`.

        Args:
            batch: sequences.
            streams: levels drafted by streams.
            vocab: tokens of the vocabulary.
            beam: parents expanded a level, and tokens of each.
            nodes: nodes of the tree.
            rank: of the transition tables, 0 for none.
            dtype: of the transition tables.
            device: where the trees are made.

        Raises:
            ValueError: `beam` is not in 1 .. 16, or there are no streams.
        """
        if not 1 <= beam <= LARGEST_BEAM:
            raise ValueError(f"beam must be 1 to {LARGEST_BEAM}, got {beam}.")
        if streams < 1:
            raise ValueError(f"drafting needs at least one stream, got {streams}.")
        width, parents = list_sizes(beam)
        block = vocabulary_block(vocab, rank, dtype)
        blocks = -(-vocab // block)
        sizes = kernel_sizes(beam, nodes, streams, blocks)
        blocks = next_power_of_two(blocks)
        pool = (batch, streams, sizes["SLOTS"])

        def empty(*shape: int, dtype: torch.dtype, fill: float = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        return cls(
            beam=beam,
            keep=sizes["KEEP"],
            block=block,
            keys=empty(2, batch, parents, width, blocks, dtype=torch.int64, fill=NO_KEY),
            parts=empty(2, batch, parents, blocks, dtype=torch.float32, fill=float("-inf")),
            sums=empty(*pool, dtype=torch.float32, fill=float("-inf")),
            tokens=empty(*pool, dtype=torch.int32),
            parents=empty(*pool, dtype=torch.int32, fill=-1),
        )


def vocabulary_block(vocab: int, rank: int, dtype: torch.dtype) -> int:
    """Returns the tokens that one program scores."""
    most = SMALL_BLOCK if vocab <= SMALL_VOCABULARY else LARGE_BLOCK
    fits = TABLE_BYTES // (padded_rank(rank) * dtype.itemsize) if rank else most
    return max(16, min(most, 1 << (fits.bit_length() - 1)))


def list_sizes(beam: int) -> tuple[int, int]:
    """Returns the length of the lists that kernels sort, and the parents they score: 8 are the least of a tensor core."""
    width = max(2, next_power_of_two(beam))
    return width, max(8, width)


def block_warps(block: int) -> int:
    """Returns the warps of a program that scores a block; each multiplies at least 16 tokens."""
    return min(SMALL_WARPS if block <= SMALL_BLOCK else LARGE_WARPS, block // 16)


def kernel_sizes(beam: int, nodes: int, streams: int, blocks: int) -> dict[str, int]:
    """Returns the constants that both kernels have in common."""
    width, parents = list_sizes(beam)
    keep = min(max(nodes - 1, beam), width * width)
    return {
        "STREAMS": streams,
        "BEAM": beam,
        "KEEP": keep,
        "SLOTS": next_power_of_two(keep + 1),
        "PARENTS": parents,
        "LOG_WIDTH": width.bit_length() - 1,
        "LOG_BLOCKS": (blocks - 1).bit_length(),
        "LOG_MERGED": (min(blocks, MERGED_KEYS // width) - 1).bit_length(),
    }


def next_power_of_two(number: int) -> int:
    """Returns the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def padded_rank(rank: int) -> int:
    """Returns the rank as the kernels take it: a power of two that `tl.dot` accepts, 0 for none."""
    return max(16, next_power_of_two(rank)) if rank else 0
