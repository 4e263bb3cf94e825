"""Times variants of the one-row packed product beside the present kernel: python3 -m experiments.row_variants [--seconds 58].

Every variant is checked against the product by plain operations on fresh random inputs, with a poisoned output, twice. Timed is
one graph over copies of the weight that exceed twice the second-level cache, launched as in the step (early starts).
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from benchmark.compile_ahead import Compilers
from benchmark.product_times import graph_seconds
from experiments.row_kernels import diagonal_row_kernel
from huggingface.transformers.integrations import triton_support
from huggingface.transformers.integrations.quantized_linear import (
    QuantizedWeight,
    _launch_row,
    choose_tile,
    quantized_linear_reference,
)
from huggingface.transformers.integrations.quantized_linear_tiles import Product, RowTile
from huggingface.transformers.integrations.skinny_linear import ACTIVATIONS
from huggingface.transformers.quantizers.packing import WeightFormat

INT4, INT8 = WeightFormat(4, 128), WeightFormat(8)
DIMENSIONS = {
    "down 7b": (4096, 14336, False), "out 7b": (4096, 4096, False), "gate_up 7b": (28672, 4096, True), "qkv 7b": (6144, 4096, False),
    "down 3b": (3072, 8192, False), "out 3b": (3072, 3072, False), "down neo": (2048, 8192, False), "out neo": (2048, 2048, False),
    "gate_up 3b": (16384, 3072, True),
}  # fmt: skip

LAYER = ("qkv 7b", "out 7b", "gate_up 7b", "down 7b")
SHAPES = {f"int4 {name}": (INT4, *shape) for name, shape in DIMENSIONS.items()}
SHAPES |= {f"int8 {name}": (INT8, *DIMENSIONS[name]) for name in LAYER}


@dataclass(frozen=True)
class Variant:
    """Pieces at a time (32 a warp), fours of outputs, chunks asked for before the wait, whether the rest goes to the L2 cache."""

    block: int
    quads: int
    depth: int
    prefetch: bool

    def __str__(self) -> str:
        return f"b{self.block} q{self.quads} d{self.depth}{' pre' if self.prefetch else ''}"


def variants(bits: int, inner: int, gated: bool) -> list[Variant | None]:
    """Returns what is tried, `None` being the present kernel; those that prefetch come last."""
    pieces = inner * bits // 128
    found: list[Variant] = []
    for block in (32, 64, 128, 256, 512):
        chunks = -(-pieces // block)
        if block >= 2 * pieces or chunks > (7 if bits == 8 else 14):
            continue
        for quads in (1,) if gated else (1, 2):
            for depth in (1, 2, 3, 4):
                held = depth * (2 if gated else quads)
                if depth > chunks or held > 4 or (block > 128 and held > 2) or (block == 512 and held > 1):
                    continue
                if (depth == 3 and chunks not in (3, 7)) or (bits == 8 and depth > 2):
                    continue
                if chunks > 7 and (quads > 1 or depth == 3):
                    continue  # much code
                found.append(Variant(block, quads, depth, False))
                if depth < chunks:
                    found.append(Variant(block, quads, depth, True))
    return [None, *sorted(found, key=lambda v: v.prefetch)]


def launch(
    variant: Variant | None, rows, weight: QuantizedWeight, bias, gated: bool, residual, output
) -> None:
    activation = ACTIVATIONS["silu" if gated else None]
    if variant is None:
        tile = choose_tile(rows.device, Product(weight.kind, 1, weight.outputs, weight.inner, gated))
        if not isinstance(tile, RowTile):
            raise ValueError(f"the table has {tile}")
        _launch_row(tile, rows, weight, bias, activation, gated, residual, output)
        return
    columns = output.shape[-1]
    pdl = triton_support.overlaps_launches(rows.device)
    diagonal_row_kernel[(columns // (4 * variant.quads),)](
        rows.view(torch.int32), weight.weight.view(torch.int32), weight.scale, weight.scale, rows if bias is None else bias,
        rows if residual is None else residual, output, columns,
        BITS=weight.kind.bits, PIECES=weight.inner * weight.kind.bits // 128, BLOCK=variant.block, QUADS=variant.quads, DEPTH=variant.depth, PREFETCH=variant.prefetch,
        ACTIVATION=activation, GATED=gated, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, PDL=pdl, PACKED=True,
        num_warps=variant.block // 32, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


def product(variant: Variant | None, weight: QuantizedWeight, gated: bool, residual, rows):
    """Returns a product as the step computes it: a residual is added where nothing is gated."""
    output = rows.new_empty(1, 1, weight.outputs // (2 if gated else 1))
    launch(variant, rows, weight, None, gated, residual, output)
    return output


def error(variant: Variant | None, weight: QuantizedWeight, gated: bool) -> float:
    """Returns the largest error over what plain operations may be off; above 1 it is wrong. Two runs must agree to the bit."""
    rows = torch.randn(1, 1, weight.inner, device="cuda", dtype=torch.bfloat16) + 0.25
    size = weight.outputs // (2 if gated else 1)
    residual = None if gated else torch.randn(1, 1, size, device="cuda", dtype=torch.bfloat16)
    results = []
    for poison in (float("nan"), 7e30):
        output = torch.full((1, 1, size), poison, device="cuda", dtype=torch.bfloat16)
        launch(variant, rows, weight, None, gated, residual, output)
        results.append(output)
    if not torch.equal(*results):
        return float("nan")
    given = {"activation": "silu" if gated else None, "gated": gated}
    plain = quantized_linear_reference(rows, weight, residual=residual, **given).float()
    exact = quantized_linear_reference(
        rows.float(), weight, residual=None if residual is None else residual.float(), **given
    )
    rounding = torch.finfo(torch.bfloat16).eps / 2 * float(exact.abs().max())
    allowed = 2 * float((plain - exact).abs().max()) + 2 * rounding
    return float((results[0].float() - exact).abs().max()) / allowed


def weight_of(kind: WeightFormat, outputs: int, inner: int, filled: bool) -> QuantizedWeight:
    stored = {
        n: torch.empty(s, dtype=kind.dtypes[n], device="cuda") for n, s in kind.shapes(outputs, inner).items()
    }
    if filled:
        stored["weight"].random_(0, 256) if kind.bits == 4 else stored["weight"].random_(-127, 128)
        stored["weight_scale"].uniform_(0.001, 0.004)
    return QuantizedWeight(kind, inner, stored["weight"], stored["weight_scale"])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def time_shape(name: str, tried, copies, deadline: float, results: dict, notes: list[str]) -> None:
    _, outputs, inner, gated = SHAPES[name]
    rows = torch.randn(1, 1, inner, device="cuda", dtype=torch.bfloat16)
    residual = None if gated else torch.randn(1, 1, outputs, device="cuda", dtype=torch.bfloat16)
    for variant, futures in tried:
        if perf_counter() > deadline:
            notes.append(f"{name} {variant}: no time")
            continue
        try:
            for future in futures:
                future.result()
            off = error(variant, copies[0], gated)
            if not off <= 1:
                notes.append(
                    f"{name} {variant}: WRONG, {off:.2f} of the error allowed (nan: two runs differ)"
                )
                continue
            calls = [partial(product, variant, one, gated, residual) for one in copies]
            results[name][variant] = min(graph_seconds(calls, rows) for _ in range(2))
        except Exception as problem:  # an experiment: the others go on
            notes.append(
                f"{name} {variant}: {type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"
            )


def layer(bits: int, best: dict, weights: dict) -> str:
    """Returns the time of a 7B layer's four products in a row, now and with the best of each."""
    parts = [f"int{bits} {name}" for name in LAYER]
    inputs = {n: torch.randn(1, 1, SHAPES[n][2], device="cuda", dtype=torch.bfloat16) for n in parts}
    residuals = {
        n: None if SHAPES[n][3] else torch.randn(1, 1, SHAPES[n][1], device="cuda", dtype=torch.bfloat16)
        for n in parts
    }
    texts = []
    for title, chosen in (
        ("present", dict.fromkeys(parts)),
        ("best", best),
        ("present", dict.fromkeys(parts)),
        ("best", best),
    ):

        def run(_, index, chosen=chosen):
            for n in parts:
                product(chosen[n], weights[n][index], SHAPES[n][3], residuals[n], inputs[n])

        texts.append(f"{title} {graph_seconds([partial(run, index=i) for i in (0, 1)], None) * 1e6:.1f}")
    return f"int{bits} 7b layer, qkv out gate_up down in a row, us: " + ", ".join(texts)


def library(cache: int) -> dict[str, float]:
    """Returns the seconds of the library's bfloat16 products of a 7B layer."""
    found = {}
    for name in LAYER:
        outputs, inner, _ = DIMENSIONS[name]
        rows = torch.randn(1, 1, inner, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(outputs, inner, device="cuda", dtype=torch.bfloat16)
        copies = [weight] + [weight.clone() for _ in range(2 * cache // weight.nbytes + 1)]
        found[name] = graph_seconds([partial(torch.nn.functional.linear, weight=one) for one in copies], rows)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=58)
    parser.add_argument("--shown", type=int, default=8)
    flags = parser.parse_args()
    start = perf_counter()
    results: dict = {name: {} for name in SHAPES}
    notes: list[str] = []
    with Compilers(len(os.sched_getaffinity(0))) as compilers, torch.no_grad():
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        tried: dict[str, list] = {}
        for name, (kind, outputs, inner, gated) in SHAPES.items():
            empty = weight_of(kind, outputs, inner, False)
            rows = torch.empty(1, 1, inner, device="cuda", dtype=torch.bfloat16)
            tried[name] = []
            for variant in variants(kind.bits, inner, gated):
                try:
                    size = outputs // (2 if gated else 1)
                    one = torch.empty(1, 1, size, device="cuda", dtype=torch.bfloat16)
                    futures = compilers.compile(
                        partial(launch, variant, rows, empty, None, gated, None if gated else one, one)
                    )
                    tried[name].append((variant, futures))
                except Exception:
                    notes.append(f"{name} {variant}: {traceback.format_exc().splitlines()[-1][:150]}")
            del empty
        say(
            f"{torch.cuda.get_device_name()}, {compilers.kernels} kernels to compile, {perf_counter() - start:.0f} s"
        )
        weights = {}
        for name, (kind, outputs, inner, gated) in SHAPES.items():
            stored = outputs * inner * kind.bits // 8
            weights[name] = [
                weight_of(kind, outputs, inner, True) for _ in range(max(2, 2 * cache // stored + 1))
            ]
        for late in (False, True):  # what prefetches comes last, in case it stops the device
            for name in SHAPES:
                some = [(v, f) for v, f in tried[name] if (v is not None and v.prefetch) == late]
                time_shape(name, some, weights[name], start + flags.seconds, results, notes)
        say(f"timed by {perf_counter() - start:.0f} s")
        for name, timed in results.items():
            kind, outputs, inner, gated = SHAPES[name]
            moved = outputs * inner * (0.5 + 2 / 128 if kind.bits == 4 else 1)
            ordered = sorted(timed.items(), key=lambda item: item[1])
            present = timed.get(None)
            say(
                f"{name} {outputs}x{inner}{' gated' if gated else ''}: present "
                + (f"{present * 1e6:.2f} us" if present else "failed")
            )
            cells = [f"{v} {s * 1e6:.2f} ({moved / s / 1e12:.2f})" for v, s in ordered if v is not None]
            say(
                "  "
                + "; ".join(cells[: flags.shown])
                + (" ... worst " + cells[-1] if len(cells) > flags.shown else "")
            )
        for note in notes[:40]:
            say(note)
        try:
            best = {n: min(t, key=t.get) for n, t in results.items() if t}
            for bits in (4, 8):
                say(layer(bits, best, weights))
            say("library bf16, us: " + ", ".join(f"{n} {t * 1e6:.1f}" for n, t in library(cache).items()))
        except Exception as problem:
            say(f"layer: {type(problem).__name__}: {problem}")
    say(f"done in {perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
