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

FILE = Path(__file__).with_name("quantized_linear_tiles.json")
ROWS = (1, 16, 32, 64, 128, 256)
"""Numbers of rows that tiles are chosen for; others count as the next of these."""
PROGRAMS = 132
"""Multiprocessors of an H200: fewer programs than that and the runs are divided."""
MOST_SPLITS = 8
PIECE_BYTES = 16


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


Tile = RowTile | RowsTile


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
    if isinstance(measured, RowTile) and not product.whole:
        return default_tile(product)
    return measured or default_tile(product)


def _measured(device: torch.device, product: Product) -> Tile | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found: Any = _stored().get(name, {})
    for key in product.keys:
        found = found.get(key, {})
    return read_tile(found) if found else None


@lru_cache
def _stored() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def read_tile(fields: dict[str, Any]) -> Tile:
    """Returns a tile from its fields by name; only one for one row names pieces."""
    return RowTile(**fields) if "pieces" in fields else RowsTile(**fields)


def default_tile(product: Product) -> Tile:
    """Returns a tile for a product that was not measured.

    One row: a few outputs a program, so that inputs are prepared once for all of them, but programs enough. More: the widest tile
    whose registers suffice, its runs divided until every multiprocessor has a program.
    """
    half = 2 if product.gated else 1
    if product.rows == 1 and product.whole:
        wide = 8 if product.outputs >= 8192 else 4
        threads = next(count for count in (128, 64, 32) if count <= max(32, product.pieces))
        return RowTile(wide // half, threads, threads // 32, False)
    rows = next((most for most in (16, 32) if product.rows <= most), 64)
    tiles = -(-product.columns // 64) * -(-product.rows // rows)
    splits = 1
    while tiles * splits < PROGRAMS and splits < MOST_SPLITS and 2 * splits <= runs(product.inner):
        splits *= 2
    wide = rows == 64
    return RowsTile(rows, 64, splits, 8 if wide and product.gated else 4, 3 if wide else 4)
