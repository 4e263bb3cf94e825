"""How products with packed weights are divided among programs: what was measured on a device, or else a rule.

`quantized_linear_tiles.json` holds, for a device's name, a format, a number of rows and a product, the fastest of what
`python -m benchmark.tune_products` tried there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..quantizers.packing import RUN, WeightFormat, runs
from .gluon_support import gluon_unavailable

FILE = Path(__file__).with_name("quantized_linear_tiles.json")
ROWS = (1, 8, 16, 32, 48, 64, 128, 256)
"""Numbers of rows that tiles are chosen for; others count as the next of these."""
STANDS_IN = {"8": "16", "48": "64"}
"""Numbers of rows whose tiles a file may lack, and those whose tiles serve then."""
PROGRAMS = 132
"""Multiprocessors of an H200: fewer programs than that and the runs are divided."""
MOST_SPLITS = 8
PIECE_BYTES = 16
MOST_CHUNKS = 14
"""Most chunks of the tensor cores' kernel for one row, whose loop is written out."""
MOST_FRAGMENT_ROWS = 64
"""Most rows of the kernel without shared memory, whose programs compute all rows."""


@dataclass(frozen=True)
class RowTile:
    """Tile of the kernel for one row.

    Attributes:
        columns: outputs a program computes; of a gated product, of each half.
        pieces: stretches of 16 bytes of a weight that it reads at a time.
        warps: warps of a program.
        ahead: whether it reads the next stretches while it computes.
    """

    columns: int
    pieces: int
    warps: int
    ahead: bool


@dataclass(frozen=True)
class MatrixRowTile:
    """Tile of the kernel for one row on the tensor cores.

    Attributes:
        pieces: stretches of 16 bytes of a weight that a program reads at a time, a thread each; a power of two from 32 on.
        fours: how often it computes four outputs; of a gated product, four of each half, once.
        depth: chunks of so many pieces that are asked for before the inputs are there.
    """

    pieces: int
    fours: int
    depth: int

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return self.pieces // 32


@dataclass(frozen=True)
class RowsTile:
    """Tile of the kernel for some rows.

    Attributes:
        rows, columns: rows and outputs a program computes; of a gated product, outputs of each half.
        splits: programs that share a tile's runs.
        warps, stages: warps of a program, and runs in flight.
    """

    rows: int
    columns: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class FragmentTile:
    """Tile of the kernel for few rows whose weights do not pass through shared memory (`quantized_fragment.py`).

    Attributes:
        rows: rows of a product on the tensor cores, 8 or 16; a program makes as many as it takes to compute all rows.
        columns: outputs a program computes, 16 or 32; of a gated product, of each half.
        slices: warps of a program, a power of two, each with a slice of the runs.
        runs: runs of its slice that a warp asks for at a time.
        splits: programs that share a tile's runs.
        registers: the most a thread may have.
    """

    rows: int
    columns: int
    slices: int
    runs: int
    splits: int
    registers: int

    def blocks(self, rows: int) -> int:
        """Returns how often a program computes `self.rows` rows of a product of so many."""
        return -(-rows // self.rows)

    def ahead(self, rows: int) -> int:
        """Returns how many blocks of inputs are asked for before they are needed, as measured: four at up to 8 rows, else two."""
        return min(4 if rows <= 8 else 2, self.runs * self.blocks(rows))

    def steps(self, inner: int) -> int:
        """Returns how often a program asks for weights of so many inputs."""
        return inner // (RUN * self.slices * self.runs * self.splits)

    def fits(self, product: Product) -> bool:
        """Returns whether the kernel computes a product in this tile.

        Weights must be without zero points, with a scale a run or one an output, and divide into the program's slices. The kernel
        counts in 32 bits.
        """
        kind = product.kind
        return (
            kind.group_size in (None, RUN)
            and not kind.zero_point
            and product.rows <= MOST_FRAGMENT_ROWS
            and product.inner % (RUN * self.slices * self.runs * self.splits) == 0
            and product.outputs * product.inner < 2**31
        )


Tile = RowTile | MatrixRowTile | RowsTile | FragmentTile


@dataclass(frozen=True)
class Product:
    """A product: its weight's format, its rows, outputs (of a gated one, of both halves) and inputs."""

    kind: WeightFormat
    rows: int
    outputs: int
    inner: int
    gated: bool

    @property
    def columns(self) -> int:
        """Outputs that are written."""
        return self.outputs // 2 if self.gated else self.outputs

    @property
    def pieces(self) -> int:
        """Stretches of 16 bytes of an output's weight, where it is a whole number of them."""
        return self.inner * self.kind.bits // 8 // PIECE_BYTES

    @property
    def whole(self) -> bool:
        """Whether the inputs divide into runs, as the kernel for one row wants them."""
        return self.inner % RUN == 0

    def takes(self, tile: MatrixRowTile) -> bool:
        """Returns whether the kernel for one row on the tensor cores computes this product in a tile.

        Weights must be without zero points, in whole runs, at 4 bits in groups of 128. The code grows with the chunks, and
        registers hold four chunks of four outputs, fewer the more warps a program has. Bytes of a gate spill with one chunk in
        flight of several, or one of 256 pieces, and were slower so.
        """
        kind = self.kind
        chunks = -(-self.pieces // tile.pieces)
        spills = chunks > 1 or tile.pieces > 128
        held = tile.depth * (2 if self.gated else tile.fours)
        return (
            self.rows == 1
            and self.whole
            and (kind.bits == 8 or kind.group_size == RUN)
            and not kind.zero_point
            and self.columns % (4 * tile.fours) == 0
            and not (self.gated and (tile.fours > 1 or (kind.bits == 8 and tile.depth == 1 and spills)))
            and tile.depth <= chunks <= MOST_CHUNKS
            and held <= (4 if tile.pieces <= 128 else 2 if tile.pieces == 256 else 1)
        )

    @property
    def keys(self) -> tuple[str, str, str]:
        """Where the file keeps it: format, rows, product."""
        group = f"-{self.kind.group_size}" if self.kind.group_size else ""
        rows = next(most for most in ROWS if self.rows <= most)
        gated = " gated" if self.gated else ""
        return f"int{self.kind.bits}{group}", str(rows), f"{self.outputs}x{self.inner}{gated}"


@lru_cache(maxsize=4096)
def choose_tile(device: torch.device, product: Product) -> Tile:
    """Returns the tile of a product of at most 256 rows on a device."""
    measured = _measured(device, product)
    return measured if measured is not None and _serves(measured, product) else default_tile(product)


def _serves(tile: Tile, product: Product) -> bool:
    """Returns whether a product can be computed in a tile, with the Triton that is here."""
    # The keys that tiles are kept by say neither whether a product has zero points nor whether its runs are whole.
    if isinstance(tile, RowTile):
        return product.whole
    if isinstance(tile, RowsTile):
        return True
    # These kernels hold numbers where a Triton that was not tried may not put them: one by the compiler's choice, one by Gluon.
    fits = product.takes(tile) if isinstance(tile, MatrixRowTile) else tile.fits(product)
    return fits and gluon_unavailable() is None


def _measured(device: torch.device, product: Product) -> Tile | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kind, rows, shape = product.keys
    stored = _stored().get(name, {}).get(kind, {})
    found = stored.get(rows, {}).get(shape) or stored.get(STANDS_IN.get(rows), {}).get(shape)
    return read_tile(found) if found else None


@lru_cache
def _stored() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def read_tile(fields: dict[str, Any]) -> Tile:
    """Returns a tile from its fields by name: each kind has one that the others lack."""
    if "slices" in fields:
        return FragmentTile(**fields)
    if "fours" in fields:
        return MatrixRowTile(**fields)
    return RowTile(**fields) if "pieces" in fields else RowsTile(**fields)


def default_tile(product: Product) -> Tile:
    """Returns a tile for a product that was not measured.

    One row: on the tensor cores where it can be, else a few outputs a program, so that inputs are prepared once for all of them,
    but programs enough. Up to 16: :func:`default_fragment_tile`, if any. More: the widest tile whose registers suffice, its runs
    divided until every multiprocessor has a program.
    """
    half = 2 if product.gated else 1
    matrix = default_matrix_tile(product)
    if _serves(matrix, product):
        return matrix
    if product.rows == 1 and product.whole:
        wide = 8 if product.outputs >= 8192 else 4
        threads = next(count for count in (128, 64, 32) if count <= max(32, product.pieces))
        return RowTile(wide // half, threads, threads // 32, False)
    fragment = default_fragment_tile(product)
    if fragment is not None and _serves(fragment, product):
        return fragment
    rows = next((most for most in (16, 32) if product.rows <= most), 64)
    tiles = -(-product.columns // 64) * -(-product.rows // rows)
    splits = 1
    while tiles * splits < PROGRAMS and splits < MOST_SPLITS and 2 * splits <= runs(product.inner):
        splits *= 2
    wide = rows == 64
    return RowsTile(rows, 64, splits, 8 if wide and product.gated else 4, 3 if wide else 4)


def default_matrix_tile(product: Product) -> MatrixRowTile:
    """Returns the tile of one row on the tensor cores, for a product that need not go there.

    Four outputs a program. 128 pieces at a time, fewer where 32 or 64 hold all, 256 where there would be more than four chunks
    and no gate (the longer code spills on sm_80). Two chunks in flight where a program reads two halves or, at 4 bits, more than
    two chunks. Of 13 products of Mistral-7B, Llama-3.2-3B and GPT-Neo-1.3B on an H200, with 5 to 18 tiles each, this was at most
    10 % slower than the fastest, 4 % on average.
    """
    pieces = next((count for count in (32, 64) if count >= product.pieces), 128)
    if product.pieces > 4 * pieces and not product.gated:
        return MatrixRowTile(256, 1, 1)
    chunks = -(-product.pieces // pieces)
    two = chunks > 1 if product.gated else chunks > 2 and product.kind.bits == 4
    return MatrixRowTile(pieces, 1, 2 if two else 1)


def default_fragment_tile(product: Product) -> FragmentTile | None:
    """Returns the tile of 2 to 16 rows on the kernel without shared memory, or `None` where the other kernel is about as fast.

    So many warps that a multiprocessor has its weights in flight at once: 16 where it has one program; 4 where up to 16 runs can
    all be asked for, by programs of 32 outputs where three of 16 outputs a multiprocessor would not do; 4 for two halves; else 8.
    Registers: what spills nothing. Of six products of GPT-Neo-1.3B and Mistral-7B on an H200, 6 to 14 tiles each, this was at 7
    rows 2 % slower than the fastest on average and 7 % at most, at 16 rows 4 % and 26 % (8,192 inputs, 2,048 outputs, 4 bits).
    """
    few = product.rows <= 8
    if not 1 < product.rows <= 16 or not product.whole:
        return None
    if product.gated and not (few and product.kind.bits == 4):
        return None
    count, programs, columns = runs(product.inner), -(-product.columns // 16), 16
    if programs <= PROGRAMS:
        slices, together, registers = 16, 1 if product.gated else 2, 128
    elif product.gated:
        slices, together, registers = 4, 2, 168
    elif count > 16:
        slices, together, registers = 8, 2, 112 if few else 128
    elif few or programs <= 3 * PROGRAMS:
        slices, together, registers = 4, 4, 128 if few else 168
    else:
        columns, slices, together, registers = 32, 4, 4, 255
    while count % slices:
        slices //= 2
    while count // slices % together:
        together -= 1
    return FragmentTile(8 if few else 16, columns, slices, together, 1, registers)
