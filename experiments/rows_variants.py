"""Times kernels for a few rows times packed weights, beside the present one and the vendor's library.

    python -m experiments.rows_variants [--format int4] [--rows 7,16,33,49,112] [--seconds 90] [--models gpt_neo_1.3b,mistral_7b]

Prints, for each product and number of rows, the fastest variants first. With $OUT set, all timings go to $OUT/rows_variants.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F

from benchmark import compile_ahead
from benchmark.compile_ahead import Compilers
from benchmark.product_times import FORMATS, graph_seconds
from experiments.fragment import Fragment, compile_job, launch_fragment
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight, launch
from huggingface.transformers.integrations.quantized_linear_tiles import Product, choose_tile
from huggingface.transformers.integrations.skinny_linear import ACTIVATIONS

SHAPES = {
    "qkv": (6144, 2048, False), "out": (2048, 2048, False), "up": (8192, 2048, False), "down": (2048, 8192, False),
    "7b gate_up": (28672, 4096, True), "7b down": (4096, 14336, False),
}  # fmt: skip
SHOWN = 4
compile_ahead._compile = compile_job

# Columns, slices, warps across, runs, splits, most registers: for up to 8 rows, up to 16, and more.
FEW = {
    "qkv": ["16 4 1 4 1 0", "16 4 1 4 1 128", "16 8 1 2 1 112", "32 8 1 2 1 128", "32 4 1 4 1 168", "16 4 1 2 1 128", "16 16 1 1 1 0"],
    "out": ["16 4 1 4 1 128", "16 8 1 2 1 112", "16 16 1 1 1 0", "16 8 1 1 2 0", "16 4 1 2 2 96", "32 8 1 1 2 0"],
    "up": ["16 4 1 4 1 0", "16 4 1 4 1 128", "16 8 1 2 1 112", "32 8 1 2 1 128", "32 4 1 4 1 168", "64 8 2 2 1 128", "64 4 4 4 1 128"],
    "down": [
        "16 16 1 2 1 128", "16 16 1 4 1 128", "16 8 1 4 1 168", "16 8 1 8 1 255", "16 8 1 4 2 128", "32 8 1 2 2 168", "32 8 1 4 2 255",
        "32 8 1 2 4 128", "16 16 1 1 1 0",
    ],
    "7b gate_up": ["16 4 1 2 1 168", "16 8 1 1 1 128", "16 4 1 4 1 255", "16 8 1 2 1 168", "32 8 1 1 1 168", "32 4 1 1 1 168"],
    "7b down": ["16 8 1 2 1 112", "16 4 1 4 1 168", "16 4 1 2 1 128", "16 16 1 1 1 0", "32 8 1 2 1 168", "32 4 1 2 2 168", "32 8 1 1 2 128"],
}  # fmt: skip
SOME = {
    "qkv": ["16 4 1 4 1 128", "16 4 1 4 1 168", "16 8 1 2 1 112", "32 8 1 2 1 168", "32 4 1 2 1 255", "32 4 1 2 2 168", "16 4 1 2 1 168"],
    "out": ["16 4 1 4 1 168", "16 8 1 2 1 112", "16 16 1 1 1 96", "16 8 1 1 2 96", "32 8 1 1 2 112", "32 4 1 2 2 168"],
    "up": ["16 4 1 4 1 128", "16 4 1 4 1 168", "16 8 1 2 1 112", "32 8 1 2 1 128", "32 4 1 4 1 255", "64 8 2 2 1 128", "64 4 2 2 1 255"],
    "down": [
        "16 16 1 2 1 128", "16 8 1 2 2 128", "16 8 1 4 1 255", "16 8 1 4 2 168", "32 8 1 2 2 255", "32 8 1 2 4 168", "32 4 1 4 4 255",
        "64 4 2 2 4 255", "64 4 2 4 4 255",
    ],
    "7b gate_up": ["16 4 1 2 1 168", "16 4 1 1 1 128", "16 8 1 1 1 128", "32 4 1 1 1 0", "32 8 1 1 1 0"],
    "7b down": ["16 8 1 2 1 128", "16 4 1 2 1 168", "32 4 1 2 2 255", "32 8 1 1 1 168", "32 8 1 2 1 255", "64 4 2 1 2 255"],
}  # fmt: skip
MANY = {
    "qkv": ["32 4 1 1 1 255", "16 4 1 2 1 168", "16 4 1 2 1 255", "32 8 1 1 1 255", "64 2 2 1 1 255", "32 4 1 2 2 255"],
    "out": ["16 8 1 1 1 128", "16 8 1 2 1 255", "16 16 1 1 1 128", "32 4 1 1 2 255", "32 4 1 2 2 255", "32 8 1 1 2 255"],
    "up": ["32 4 1 1 1 255", "16 4 1 2 1 168", "16 4 1 2 1 255", "32 8 1 1 1 255", "64 2 2 1 1 255", "64 4 2 1 1 255"],
    "down": ["32 4 1 1 4 255", "32 8 1 1 2 255", "32 4 1 1 2 255", "64 2 2 1 4 255", "64 4 2 1 4 255", "16 16 1 1 1 128", "16 8 1 1 1 255"],
    "7b gate_up": ["16 4 1 1 1 255", "16 8 1 1 1 255", "32 4 1 1 1 255"],
    "7b down": ["32 4 1 1 1 255", "32 4 1 1 2 255", "32 8 1 1 1 255", "64 4 2 1 2 255", "64 2 2 1 2 255", "16 4 1 2 1 255"],
}  # fmt: skip
BLOCKS = {7: [(8, 1)], 16: [(8, 2), (16, 1)], 33: [(8, 5)], 49: [(8, 7)], 112: [(8, 7), (16, 7)]}


def candidates(part: str, rows: int, inner: int) -> list[Fragment]:
    """Returns what is tried."""
    lists = FEW if rows <= 8 else SOME if rows <= 16 else MANY
    found = []
    for words in lists[part]:
        columns, slices, across, run, splits, registers = map(int, words.split())
        for size, blocks in BLOCKS[rows]:
            if size * blocks > 64 and columns > 16:
                continue  # spills
            tile = Fragment(size, blocks, columns, slices, across, run, splits, 4 if rows <= 8 else 2, registers)
            if tile.fits(inner):
                found.append(tile)
    return list(dict.fromkeys(found))


def empty_output(rows, weight, gated):
    return rows.new_empty(*rows.shape[:-1], weight.outputs // (2 if gated else 1))


def by_fragment(tile, weight, gated, rows):
    output = empty_output(rows, weight, gated)
    launch_fragment(tile, rows, weight, None, ACTIVATIONS["silu" if gated else None], gated, None, output)
    return output


def by_present(weight, gated, rows):
    count = rows.shape[-2]
    tile = choose_tile(rows.device, Product(weight.kind, count, weight.outputs, weight.inner, gated))
    output = empty_output(rows, weight, gated)
    launch(tile, rows, weight, None, ACTIVATIONS["silu" if gated else None], gated, None, output)
    return output


def finished(output, gated):
    if not gated:
        return output
    gate, factor = output.chunk(2, dim=-1)
    return F.silu(gate) * factor


def check(call, rows, gated, exact_weight, plain_weight, outputs) -> float:
    """Returns the error over what is allowed, for fresh inputs; also asserts that a second call gives the same."""
    exact = finished(F.linear(rows.float(), exact_weight), gated)
    plain = finished(F.linear(rows, plain_weight), gated)
    for _ in range(3):  # what the allocator hands out next is poisoned
        torch.full((1, rows.shape[-2], outputs), float("nan"), dtype=rows.dtype, device=rows.device)
    got = call(rows)
    rounding = torch.finfo(rows.dtype).eps / 2 * float(exact.abs().max())
    allowed = 2 * float((plain.float() - exact).abs().max()) + 2 * rounding
    error = float((got.float() - exact).abs().max()) / allowed
    return error if torch.equal(got, call(rows)) else float("inf")


def compile_all(compilers, parts, counts, kind, device):
    futures = {}
    for part in parts:
        outputs, inner, gated = SHAPES[part]
        stored = {n: torch.empty(s, dtype=kind.dtypes[n], device=device) for n, s in kind.shapes(outputs, inner).items()}
        weight = QuantizedWeight(kind, inner, stored["weight"], stored["weight_scale"])
        for count in counts:
            rows = torch.empty(1, count, inner, device=device, dtype=torch.bfloat16)
            futures[part, count, None] = compilers.compile(partial(by_present, weight, gated, rows))
            for tile in candidates(part, count, inner):
                try:
                    futures[part, count, tile] = compilers.compile(partial(by_fragment, tile, weight, gated, rows))
                except Exception:
                    say(f"not compiled: {part} {count} {tile}: {traceback.format_exc(limit=1)[-200:]}")
    return futures


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def measure_part(part, counts, kind, futures, device, cache, deadline, results) -> None:
    outputs, inner, gated = SHAPES[part]
    dense = torch.randn(outputs, inner, device=device, dtype=torch.bfloat16) * inner**-0.5
    plain_copies = [dense] + [dense.clone() for _ in range(min(64, 2 * cache // dense.nbytes))]
    given = {n: torch.randn(1, n, inner, device=device, dtype=torch.bfloat16) for n in counts}
    library = {n: graph_seconds([lambda r, w=w: F.linear(r, w) for w in plain_copies], given[n]) for n in counts}
    del plain_copies
    weight = QuantizedWeight.of(dense, kind)
    stored = sum(tensor.nbytes for tensor in weight.tensors().values())
    copies = [weight] + [
        QuantizedWeight(kind, inner, weight.weight.clone(), weight.scale.clone()) for _ in range(min(64, 2 * cache // stored))
    ]
    exact_weight, plain_weight = weight.dense(torch.float32), weight.dense(torch.bfloat16)
    for count in counts:
        cell = {"part": part, "rows": count, "library": library[count], "tiles": [], "failed": []}
        results.append(cell)
        for tile in [None, *candidates(part, count, inner)]:
            if perf_counter() > deadline:
                cell["failed"].append(f"{tile}: no time")
                continue
            name = "present" if tile is None else str(tile)
            try:
                for future in futures[part, count, tile]:
                    future.result()

                def call(rows, w=weight, tile=tile):
                    return by_present(w, gated, rows) if tile is None else by_fragment(tile, w, gated, rows)

                error = check(call, given[count], gated, exact_weight, plain_weight, outputs)
                if not error <= 1:
                    cell["failed"].append(f"{name}: error {error:.2f}")
                    continue
                seconds = graph_seconds([partial(call, w=one) for one in copies], given[count])
            except Exception as problem:
                cell["failed"].append(f"{name}: {type(problem).__name__} {str(problem).splitlines()[0][:80] if str(problem) else ''}")
                continue
            if tile is None:
                cell["present"] = seconds
            else:
                cell["tiles"].append((seconds, name))


def report(results) -> str:
    lines = ["us; fastest variants first; n ROWSxBLOCKS m COLUMNS s SLICESxWARPS r RUNS a AHEAD k SPLITS reg MAXNREG"]
    for cell in results:
        best = sorted(cell["tiles"])
        shown = "; ".join(f"{seconds * 1e6:.2f} {name}" for seconds, name in best[:SHOWN])
        worst = f" .. {best[-1][0] * 1e6:.1f}" if len(best) > SHOWN else ""
        lines.append(
            f"{cell['part']} {cell['rows']}: now {cell.get('present', float('nan')) * 1e6:.2f} bf16 {cell['library'] * 1e6:.2f} | {shown}{worst}"
        )
        if cell["failed"]:
            lines.append(f"  failed {len(cell['failed'])}: {'; '.join(cell['failed'])[:240]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--format", default="int4", choices=list(FORMATS))
    parser.add_argument("--rows", default="7,16,33,49,112")
    parser.add_argument("--parts", default=",".join(SHAPES))
    parser.add_argument("--seconds", type=float, default=90)
    flags = parser.parse_args()
    deadline = perf_counter() + flags.seconds
    counts, parts = [int(n) for n in flags.rows.split(",")], flags.parts.split(",")
    kind, results = FORMATS[flags.format], []
    with Compilers(len(os.sched_getaffinity(0))) as compilers, torch.no_grad():
        device = torch.device("cuda")
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        futures = compile_all(compilers, parts, counts, kind, device)
        say(f"{compilers.kernels} kernels to compile, {sum(map(len, futures.values()))} launches")
        try:
            for part in parts:
                measure_part(part, counts, kind, futures, device, cache, deadline, results)
                say(f"{part} done, {deadline - perf_counter():.0f} s left")
                torch.cuda.empty_cache()
        except Exception:
            say(traceback.format_exc()[-600:])
        for pending in futures.values():
            for future in pending:
                future.cancel()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {flags.format}")
    say(report(results))
    if os.environ.get("OUT"):
        Path(os.environ["OUT"], f"rows_variants_{flags.format}.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
