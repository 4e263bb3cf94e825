"""Which tiles `tune_products` tries for a product with packed weights."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface.transformers.integrations.quantized_linear_tiles import (
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
    16: [(16, 64, 2, 4), (16, 64, 4, 6), (16, 64, 4, 4), (16, 32, 2, 4)],
    32: [(32, 64, 2, 4), (32, 64, 4, 4), (32, 128, 4, 4), (32, 128, 8, 3)],
    64: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 8, 3)],
    128: [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 8, 3)],
}
"""For each number of rows, rows, columns, warps and stages of the tiles on the tensor cores that are tried."""


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


def candidates(product: Product) -> list[Tile]:
    """Returns the tiles that are tried for a product, the rule's own first."""
    found: list[Tile] = [default_tile(product)]
    if product.rows == 1:
        found += row_candidates(product)
    found += rows_candidates(product)
    return list(dict.fromkeys(found))
