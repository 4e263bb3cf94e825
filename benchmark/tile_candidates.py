"""Which tiles `tune_products` tries for a product with packed weights."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface.transformers.integrations.gluon_support import gluon_unavailable
from huggingface.transformers.integrations.quantized_linear_tiles import (
    ROWS,
    FragmentTile,
    MatrixRowTile,
    Product,
    RowsTile,
    RowTile,
    Tile,
    default_tile,
)
from huggingface.transformers.quantizers.packing import runs

FEWEST_PROGRAMS, MOST_PROGRAMS = 100, 600
"""Programs of a product whose runs are divided: fewer leave multiprocessors idle, more only add partial sums."""
MATRIX_ROW_TILES = [(32, 1, 1), (64, 1, 1), (64, 1, 2), (128, 1, 1), (128, 1, 2), (128, 2, 1), (256, 1, 1)]
"""Pieces, fours and depth of the tiles for one row on the tensor cores: each was the fastest of 5 to 18 at one or more of 13
products on an H200."""
TILES = {
    1: [(8, 64, 4, 4)],
    8: [(16, 64, 2, 4), (16, 64, 4, 4)],
    16: [(16, 64, 2, 4), (16, 64, 4, 6), (16, 64, 4, 4), (16, 32, 2, 4)],
    32: [(32, 64, 2, 4), (32, 64, 4, 4), (32, 128, 4, 4), (32, 128, 8, 3)],
    48: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4)],
    64: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 8, 3)],
    128: [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 8, 3)],
}
"""For each number of rows, rows, columns, warps and stages of the tiles on the tensor cores that are tried."""

FRAGMENT_TILES = {
    8: (
        [
            (8, 16, 4, 4, 1, 128), (8, 16, 8, 2, 1, 112), (8, 16, 16, 1, 1, 128), (8, 16, 16, 2, 1, 128), (8, 16, 16, 4, 1, 128),
            (8, 16, 8, 8, 1, 255), (8, 32, 4, 4, 1, 255), (8, 32, 8, 2, 1, 128), (8, 32, 8, 2, 4, 128), (8, 32, 8, 1, 2, 128),
        ],
        [
            (8, 16, 8, 2, 1, 112), (8, 16, 16, 1, 1, 128), (8, 16, 16, 2, 1, 128), (8, 16, 4, 4, 1, 168), (8, 32, 8, 1, 2, 128),
            (8, 32, 8, 2, 1, 168), (8, 16, 8, 1, 1, 128),
        ],
        [(8, 16, 4, 2, 1, 168), (8, 16, 8, 1, 1, 128), (8, 16, 16, 1, 1, 128)],
    ),
    16: (
        [
            (16, 16, 4, 4, 1, 168), (8, 16, 4, 4, 1, 255), (16, 16, 8, 2, 1, 128), (8, 16, 8, 2, 1, 128), (8, 16, 16, 1, 1, 128),
            (16, 16, 16, 1, 1, 96), (16, 16, 16, 2, 1, 128), (16, 32, 4, 4, 1, 255), (16, 32, 4, 4, 4, 255),
            (16, 32, 8, 2, 1, 168),
        ],
        [(16, 16, 8, 2, 1, 128), (8, 16, 8, 2, 1, 168), (16, 16, 16, 1, 1, 128), (16, 32, 8, 2, 1, 255)],
        [(8, 16, 4, 1, 1, 128), (16, 16, 4, 1, 1, 168)],
    ),
    32: (
        [(8, 16, 8, 2, 1, 255), (16, 16, 8, 2, 1, 255), (8, 16, 4, 2, 1, 255)],
        [(8, 16, 8, 2, 1, 255), (16, 16, 8, 2, 1, 255), (8, 32, 4, 1, 1, 255), (16, 32, 4, 1, 1, 255), (8, 32, 4, 1, 4, 255)],
        [],
    ),
    48: (
        [(8, 16, 8, 2, 1, 255)],
        [(8, 16, 8, 2, 1, 255), (8, 32, 4, 1, 1, 255), (8, 32, 4, 1, 4, 255), (8, 32, 8, 1, 2, 255)],
        [],
    ),
    64: ([(8, 16, 8, 2, 1, 255)], [], []),
}  # fmt: skip
"""For each number of rows, the fields of the tiles without shared memory that are tried: of products whose programs ask for all
their weights at once, of others, of gated ones. Most were among the fastest of up to 16 at one or more of six products on an
H200; none spills there."""


def row_candidates(product: Product) -> Iterator[RowTile | MatrixRowTile]:
    """Yields tiles of the kernels for one row."""
    for pieces, fours, depth in MATRIX_ROW_TILES:
        tile = MatrixRowTile(pieces, fours, depth)
        if pieces < 2 * product.pieces and product.takes(tile):
            yield tile
    half = 2 if product.gated else 1
    for columns, pieces, warps in (
        (2, 128, 4), (4, 128, 4), (8, 128, 4), (4, 64, 2), (8, 64, 2), (4, 32, 1), (8, 32, 1), (16, 32, 4), (4, 256, 8),
    ):  # fmt: skip
        if pieces >= 2 * product.pieces:
            continue
        for ahead in (False, True):
            if not ahead or (pieces < product.pieces and columns < 8):
                yield RowTile(columns // half, pieces, warps, ahead)


def rows_candidates(product: Product) -> Iterator[RowsTile]:
    """Yields tiles of the kernel on the tensor cores."""
    for rows, columns, warps, stages in TILES[min(product.rows, 128)]:
        if (
            product.gated
            and rows > 16
            and (warps == 2 or rows * columns > 1024 * warps or warps * 32 == columns)
        ):
            continue  # spills
        tiles = -(-product.columns // columns) * -(-product.rows // rows)
        most = max(1, min(MOST_PROGRAMS // tiles, runs(product.inner) // 2))
        possible = [splits for splits in (1, 2, 4, 8) if splits <= most]
        for splits in possible:
            if tiles * splits >= FEWEST_PROGRAMS or splits == possible[-1]:
                yield RowsTile(rows, columns, splits, warps, stages)


def fragment_candidates(product: Product) -> Iterator[FragmentTile]:
    """Yields tiles of the kernel without shared memory."""
    rows = next(most for most in ROWS if product.rows <= most)
    once, others, gated = FRAGMENT_TILES.get(rows, ([], [], []))
    for fields in gated if product.gated else once + others:
        tile = FragmentTile(*fields)
        short = fields in once if tile.steps(product.inner) == 1 else fields in others
        if tile.fits(product) and gluon_unavailable() is None and (product.gated or short):
            yield tile


def candidates(product: Product) -> list[Tile]:
    """Returns the tiles that are tried for a product, the rule's own first."""
    found: list[Tile] = [default_tile(product)]
    if product.rows == 1:
        found += row_candidates(product)
    found += fragment_candidates(product)
    found += rows_candidates(product)
    return list(dict.fromkeys(found))
