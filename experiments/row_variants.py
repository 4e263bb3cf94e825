"""Times variants of the one-row packed product beside the present kernel: python3 -m experiments.row_variants [--seconds 70].

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

KIND = WeightFormat(4, 128)
SHAPES = {
    "down 7b": (4096, 14336, False), "out 7b": (4096, 4096, False), "gate_up 7b": (28672, 4096, True), "qkv 7b": (6144, 4096, False),
    "down 3b": (3072, 8192, False), "out 3b": (3072, 3072, False), "down neo": (2048, 8192, False), "out neo": (2048, 2048, False),
    "gate_up 3b": (16384, 3072, True),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    block: int
    quads: int
    depth: int
    prefetch: bool
    registers: int | None = None

    def __str__(self) -> str:
        limit = f" r{self.registers}" if self.registers else ""
        return f"b{self.block} q{self.quads} d{self.depth}{' pre' if self.prefetch else ''}{limit}"


def variants(inner: int, gated: bool) -> list[Variant | None]:
    """Returns what is tried, `None` being the present kernel; those that prefetch come last."""
    pieces = inner // 32
    found: list[Variant] = []
    for block in (32, 64, 128, 256, 512):
        chunks = -(-pieces // block)
        if block >= 2 * pieces or chunks > 14:
            continue
        for quads in (1,) if gated else (1, 2):
            for depth in (1, 2, 3, 4):
                held = depth * (2 if gated else quads)
                if depth > chunks or held > 4 or (block > 128 and held > 2) or (block == 512 and held > 1):
                    continue
                if depth == 3 and chunks not in (3, 7):
                    continue
                if chunks > 7 and (quads > 1 or depth == 3):
                    continue  # much code
                found.append(Variant(block, quads, depth, False))
                if depth < chunks:
                    found.append(Variant(block, quads, depth, True))
    return [None, *sorted(found, key=lambda v: v.prefetch)]


def launch(variant: Variant | None, rows, weight: QuantizedWeight, bias, gated: bool, residual, output) -> None:
    activation = ACTIVATIONS["silu" if gated else None]
    if variant is None:
        tile = choose_tile(rows.device, Product(KIND, 1, weight.outputs, weight.inner, gated))
        if not isinstance(tile, RowTile):
            raise ValueError(f"the table has {tile}")
        _launch_row(tile, rows, weight, bias, activation, gated, residual, output)
        return
    columns = output.shape[-1]
    pdl = triton_support.overlaps_launches(rows.device)
    options = {"maxnreg": variant.registers} if variant.registers else {}
    diagonal_row_kernel[(columns // (4 * variant.quads),)](
        rows.view(torch.int32), weight.weight.view(torch.int32), weight.scale, weight.scale, rows if bias is None else bias,
        rows if residual is None else residual, output, columns,
        PIECES=weight.inner // 32, BLOCK=variant.block, QUADS=variant.quads, DEPTH=variant.depth, PREFETCH=variant.prefetch,
        ACTIVATION=activation, GATED=gated, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, PDL=pdl, PACKED=True,
        num_warps=variant.block // 32, **({"launch_pdl": True} if pdl else {}), **options,
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


def weight_of(outputs: int, inner: int, filled: bool) -> QuantizedWeight:
    stored = {n: torch.empty(s, dtype=KIND.dtypes[n], device="cuda") for n, s in KIND.shapes(outputs, inner).items()}
    if filled:
        stored["weight"].random_(0, 256)
        stored["weight_scale"].uniform_(0.001, 0.004)
    return QuantizedWeight(KIND, inner, stored["weight"], stored["weight_scale"])


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def time_shape(name: str, tried, copies, deadline: float, results: dict, notes: list[str]) -> None:
    outputs, inner, gated = SHAPES[name]
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
                notes.append(f"{name} {variant}: WRONG, {off:.2f} of the error allowed (nan: two runs differ)")
                continue
            calls = [partial(product, variant, one, gated, residual) for one in copies]
            results[name][variant] = min(graph_seconds(calls, rows) for _ in range(2))
        except Exception as problem:  # an experiment: the others go on
            notes.append(f"{name} {variant}: {type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}")


def layer(best: dict, weights: dict) -> str:
    """Returns the time of a 7B layer's four products in a row, now and with the best of each."""
    parts = ("qkv 7b", "out 7b", "gate_up 7b", "down 7b")
    inputs = {n: torch.randn(1, 1, SHAPES[n][1], device="cuda", dtype=torch.bfloat16) for n in parts}
    residuals = {n: None if n.startswith(("gate", "qkv")) else torch.randn(1, 1, SHAPES[n][0], device="cuda", dtype=torch.bfloat16) for n in parts}
    texts = []
    for title, chosen in (("present", dict.fromkeys(parts)), ("best", {n: best[n] for n in parts})):
        def run(_, index, chosen=chosen):
            for n in parts:
                product(chosen[n], weights[n][index], SHAPES[n][2], residuals[n], inputs[n])
        seconds = graph_seconds([partial(run, index=i) for i in (0, 1)], None)
        texts.append(f"{title} {seconds * 1e6:.1f} us")
    return "7b layer, qkv out gate_up down in a row: " + ", ".join(texts)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--shown", type=int, default=9)
    flags = parser.parse_args()
    start = perf_counter()
    results: dict = {name: {} for name in SHAPES}
    notes: list[str] = []
    with Compilers(len(os.sched_getaffinity(0))) as compilers, torch.no_grad():
        cache = torch.cuda.get_device_properties("cuda").L2_cache_size
        tried: dict[str, list] = {}
        for name, (outputs, inner, gated) in SHAPES.items():
            empty = weight_of(outputs, inner, False)
            rows = torch.empty(1, 1, inner, device="cuda", dtype=torch.bfloat16)
            tried[name] = []
            for variant in variants(inner, gated):
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
        say(f"{torch.cuda.get_device_name()}, {compilers.kernels} kernels to compile, {perf_counter() - start:.0f} s")
        weights = {}
        for name, (outputs, inner, gated) in SHAPES.items():
            stored = outputs * inner // 2
            weights[name] = [weight_of(outputs, inner, True) for _ in range(max(2, 2 * cache // stored + 1))]
        for late in (False, True):  # what prefetches comes last, in case it stops the device
            for name in SHAPES:
                some = [(v, f) for v, f in tried[name] if (v is not None and v.prefetch) == late]
                time_shape(name, some, weights[name], start + flags.seconds, results, notes)
        say(f"timed by {perf_counter() - start:.0f} s")
        for name, timed in results.items():
            outputs, inner, gated = SHAPES[name]
            moved = outputs * inner * (0.5 + 2 / 128)
            ordered = sorted(timed.items(), key=lambda item: item[1])
            present = timed.get(None)
            say(f"{name} {outputs}x{inner}{' gated' if gated else ''}: present " + (f"{present * 1e6:.2f} us" if present else "failed"))
            cells = [f"{v} {s * 1e6:.2f} ({moved / s / 1e12:.2f})" for v, s in ordered if v is not None]
            say("  " + "; ".join(cells[: flags.shown]) + (" ... worst " + cells[-1] if len(cells) > flags.shown else ""))
        for note in notes[:40]:
            say(note)
        try:
            best = {n: min((v for v in t if v is not None), key=t.get) for n, t in results.items() if len(t) > 1}
            say(layer(best, weights))
        except Exception as problem:
            say(f"layer: {type(problem).__name__}: {problem}")
    say(f"done in {perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
