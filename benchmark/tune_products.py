"""Finds the fastest tiles of products with packed weights on a device.

    python -m benchmark.tune_products --output huggingface/transformers/integrations/quantized_linear_tiles.json

For every product of the published decoders of `product_times`, or of the models that `--models` names, every format and number of
rows, it times what `tile_candidates.py` names, in a graph over copies of a weight that together exceed the second-level cache. A
candidate whose result is off is dropped and named. The fastest goes into the file under the device's name; what was not timed,
such as the rows that `--rows` leaves out, stays as it was. Beside the file, `.md` has this call's times and `.timings.json` those
of every candidate. Kernels are compiled in processes of their own meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F

from benchmark.compile_ahead import Compilers
from benchmark.device_times import setting
from benchmark.files import read_json, write_atomically, write_json
from benchmark.product_times import FORMATS, SHAPES, Shape, geometric_mean, graph_seconds
from benchmark.tile_candidates import candidates
from huggingface.transformers.integrations import triton_support
from huggingface.transformers.integrations.quantized_linear import (
    QuantizedWeight,
    launch,
)
from huggingface.transformers.integrations.quantized_linear_tiles import Product, Tile
from huggingface.transformers.integrations.skinny_linear import ACTIVATIONS
from huggingface.transformers.quantizers.packing import WeightFormat

TUNABLE = {
    **SHAPES,
    "gpt_neo_1.3b": {
        "qkv": Shape(6144, 2048), "out": Shape(2048, 2048), "up": Shape(8192, 2048), "down": Shape(2048, 8192),
    },
    "gpt2": {"qkv": Shape(2304, 768), "out": Shape(768, 768), "up": Shape(3072, 768), "down": Shape(768, 3072)},
}  # fmt: skip
"""Products by model; GPT-Neo-125M has the same as GPT-2."""
TIMED_ROWS = {
    1: (1,), 8: (7,), 16: (16,), 32: (32,), 48: (33, 48), 64: (49, 64), 128: (112,), 256: (224,),
}  # fmt: skip
"""For each number of rows that tiles are chosen for, those that are timed; the least sum is chosen."""
MOST_COPIES = 128
SHOWN = 3
"""Tiles of a product that are reported, the fastest first."""


@dataclass
class Tuning:
    """What one call found.

    Attributes:
        deadline: clock time after which no further candidate is timed.
        timings: a line for each product, format, rows and candidate: what it is, and `s`, seconds for each number of rows.
        baseline: for outputs, inner and rows, the half-precision product's seconds.
        skipped: candidates that were not timed because of the deadline.
        timed: which of `TIMED_ROWS` are tuned.
    """

    deadline: float
    timings: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[tuple[int, int, int], float] = field(default_factory=dict)
    skipped: int = 0
    timed: dict[int, tuple[int, ...]] = field(default_factory=lambda: TIMED_ROWS)


def products(models: Sequence[str]) -> Iterator[tuple[str, str, Shape]]:
    """Yields model, part and shape of every different product."""
    seen = set()
    for model in models:
        for part, shape in TUNABLE[model].items():
            if shape not in seen:
                seen.add(shape)
                yield model, part, shape


def run_tile(tile: Tile, rows: torch.Tensor, weight: QuantizedWeight, gated: bool) -> torch.Tensor:
    """Returns the product, activated by SiLU where gated, of (1, rows, in) with a weight, computed in a tile."""
    output = rows.new_empty(*rows.shape[:-1], weight.outputs // (2 if gated else 1))
    activation = ACTIVATIONS["silu" if gated else None]
    launch(tile, rows, weight, None, activation, gated, None, output)
    return output


def compile_all(
    compilers: Compilers, models: Sequence[str], device: torch.device, timed: Mapping[int, Sequence[int]]
) -> dict[Any, list[Any]]:
    """Starts every compilation; returns the futures by product and tile."""
    futures: dict[Any, list[Any]] = {}
    for _, _, shape in products(models):
        for kind in FORMATS.values():
            stored = {
                name: torch.empty(size, dtype=kind.dtypes[name], device=device)
                for name, size in kind.shapes(shape.outputs, shape.inner).items()
            }
            weight = QuantizedWeight(kind, shape.inner, stored["weight"], stored["weight_scale"])
            for most, counts in timed.items():
                given = [torch.empty(1, n, shape.inner, device=device, dtype=torch.bfloat16) for n in counts]
                product = Product(kind, most, shape.outputs, shape.inner, shape.gated)
                for tile in candidates(product):
                    calls = [partial(run_tile, tile, rows, weight, shape.gated) for rows in given]
                    futures[product, tile] = [f for call in calls for f in compilers.compile(call)]
    return futures


def off(
    tile: Tile,
    rows: torch.Tensor,
    weight: QuantizedWeight,
    gated: bool,
    exact: torch.Tensor,
    plain: torch.Tensor,
) -> float:
    """Returns a tile's largest error over what plain operations of the dtype may be off; above 1 it is wrong."""
    got = run_tile(tile, rows, weight, gated)
    rounding = torch.finfo(rows.dtype).eps / 2 * float(exact.abs().max())
    allowed = 2 * float((plain.float() - exact).abs().max()) + 2 * rounding
    return float((got.float() - exact).abs().max()) / allowed


def tune_format(
    tuning: Tuning, name: str, shape: Shape, kind: WeightFormat, futures: dict[Any, list[Any]], device: torch.device,
    cache_bytes: int,
) -> None:  # fmt: skip
    """Times all candidates of a product in one format."""
    dense = torch.randn(shape.outputs, shape.inner, device=device, dtype=torch.bfloat16) * 0.02
    weight = QuantizedWeight.of(dense, kind)
    stored = sum(tensor.nbytes for tensor in weight.tensors().values())
    exact_weight, plain_weight = weight.dense(torch.float32), weight.dense(torch.bfloat16)
    copies = [weight] + [
        QuantizedWeight(kind, shape.inner, weight.weight.clone(), weight.scale.clone())
        for _ in range(min(MOST_COPIES, 2 * cache_bytes // stored))
    ]
    for most, counts in tuning.timed.items():
        product = Product(kind, most, shape.outputs, shape.inner, shape.gated)
        given = {
            count: torch.randn(1, count, shape.inner, device=device, dtype=torch.bfloat16) for count in counts
        }
        answers = {
            count: tuple(
                finished(F.linear(rows.to(dense.dtype), dense), shape.gated)
                for dense in (exact_weight, plain_weight)
            )
            for count, rows in given.items()
        }
        before = len(tuning.timings)
        for tile in candidates(product):
            if perf_counter() > tuning.deadline:
                tuning.skipped += 1
                continue
            try:
                for future in futures[product, tile]:
                    future.result()
                errors = [
                    off(tile, rows, weight, shape.gated, *answers[count]) for count, rows in given.items()
                ]
            except (RuntimeError, triton_support.triton.errors.TritonError) as error:
                say(f"dropped: {name} {product.keys} {tile}: {str(error).splitlines()[0]}")
                continue
            if not max(errors) <= 1:
                say(f"dropped: {name} {product.keys} {tile}: {max(errors):.2f} of the error allowed")
                continue
            calls = [lambda r, w=one, t=tile: run_tile(t, r, w, shape.gated) for one in copies]
            seconds = {count: graph_seconds(calls, rows) for count, rows in given.items()}
            tuning.timings.append(
                {
                    "name": name, "format": product.keys[0], "rows": most, "outputs": shape.outputs, "inner": shape.inner,
                    "gated": shape.gated, "bytes": stored, "tile": asdict(tile), "s": seconds,
                }
            )  # fmt: skip
        base = sum(tuning.baseline[shape.outputs, shape.inner, count] for count in counts)
        for timing in sorted(tuning.timings[before:], key=total)[:SHOWN]:
            say(f"{name} {' '.join(product.keys)}: {base / total(timing):.2f} of bf16, {described(timing)}")


def total(timing: dict[str, Any]) -> float:
    """Returns a candidate's seconds for all numbers of rows."""
    return sum(timing["s"].values())


def described(timing: dict[str, Any]) -> str:
    """Returns a candidate's microseconds for each number of rows and its tile in words."""
    times = " + ".join(f"{seconds * 1e6:.1f}" for seconds in timing["s"].values())
    return f"{times} us: {', '.join(f'{name} {value}' for name, value in timing['tile'].items())}"


def finished(output: torch.Tensor, gated: bool) -> torch.Tensor:
    """Returns a plain product with the gate applied where it has one."""
    if not gated:
        return output
    gate, factor = output.chunk(2, dim=-1)
    return F.silu(gate) * factor


def time_baseline(tuning: Tuning, shape: Shape, device: torch.device, cache_bytes: int) -> None:
    """Times the half-precision product of a shape."""
    weight = torch.randn(shape.outputs, shape.inner, device=device, dtype=torch.bfloat16)
    copies = [weight] + [weight.clone() for _ in range(min(MOST_COPIES, 2 * cache_bytes // weight.nbytes))]
    calls = [lambda rows, w=one: F.linear(rows, w) for one in copies]
    for count in (count for counts in tuning.timed.values() for count in counts):
        rows = torch.randn(1, count, shape.inner, device=device, dtype=torch.bfloat16)
        tuning.baseline[shape.outputs, shape.inner, count] = graph_seconds(calls, rows)


def say(text: str) -> None:
    """Writes a line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def fastest(tuning: Tuning) -> list[list[dict[str, Any]]]:
    """Returns the fastest few timings of each product, format and rows, the fastest first."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for timing in tuning.timings:
        groups.setdefault(tuple(timing[part] for part in ("name", "format", "rows")), []).append(timing)
    return [sorted(timings, key=total)[:SHOWN] for timings in groups.values()]


def table(tuning: Tuning) -> dict[str, Any]:
    """Returns the fastest tiles as `quantized_linear_tiles.json` holds them for one device."""
    found: dict[str, Any] = {}
    for timing, *_ in fastest(tuning):
        gated = " gated" if timing["gated"] else ""
        rows = found.setdefault(timing["format"], {}).setdefault(str(timing["rows"]), {})
        rows[f"{timing['outputs']}x{timing['inner']}{gated}"] = timing["tile"]
    return found


def completed(stored: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns what a file holds for a device with what was found; formats, rows and products that were not tuned stay."""
    kept = {kind: dict(rows) for kind, rows in stored.items()}
    for kind, rows in found.items():
        for most, tiles in rows.items():
            before = kept.setdefault(kind, {}).get(most, {})
            kept[kind][most] = {**before, **tiles}
    return kept


def report(tuning: Tuning, where: dict[str, Any]) -> str:
    """Returns the fastest tiles' times as Markdown."""
    groups: dict[tuple[str, int], list[float]] = {}
    lines, others = [], []
    for timing, *rest in fastest(tuning):
        if rest:
            several = "; ".join(map(described, rest))
            others.append(f"| {timing['name']} | {timing['format']} | {timing['rows']} | {several} |")
        for count, seconds in timing["s"].items():
            base = tuning.baseline[timing["outputs"], timing["inner"], count]
            groups.setdefault((timing["format"], count), []).append(base / seconds)
            tile = ", ".join(f"{name} {value}" for name, value in timing["tile"].items())
            lines.append(
                f"| {timing['name']} | {timing['format']} | {count} | {seconds * 1e6:.1f} | "
                f"{timing['bytes'] / seconds / 1e12:.2f} | {base * 1e6:.1f} | {base / seconds:.2f} | {tile} |"
            )
    means = [
        f"| {kind} | {rows} | {geometric_mean(all_):.2f} |" for (kind, rows), all_ in sorted(groups.items())
    ]
    head = [
        f"{where['device_name']}, {where['date'][:10]}; torch {where['torch']}, triton {where['triton']}. Speed over the "
        f"vendor's bfloat16 product, geometric mean. {tuning.skipped} candidates were not timed.",
        "", "| format | rows | ratio |", "| --- | ---: | ---: |", *means, "",
        "| product | format | rows | us | TB/s | bf16, us | ratio | tile |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    tail = ["", "| product | format | rows up to | the next fastest |", "| --- | --- | ---: | --- |", *others]
    return "\n".join(head + lines + (tail if others else [])) + "\n"


def tune(
    compilers: Compilers, models: Sequence[str], rows: Sequence[int], device: torch.device, seconds: float
) -> Tuning:
    """Returns what all products' candidates take."""
    tuning = Tuning(perf_counter() + seconds, timed={most: TIMED_ROWS[most] for most in rows})
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    futures = compile_all(compilers, models, device, tuning.timed)
    say(f"{len(futures)} candidates, {compilers.kernels} kernels to compile")
    for model, part, shape in products(models):
        time_baseline(tuning, shape, device, cache)
        for kind in FORMATS.values():
            tune_format(tuning, f"{model} {part}", shape, kind, futures, device, cache)
        torch.cuda.empty_cache()
    return tuning


def _arguments(words: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Returns the parser and its flags, `models` and `rows` as lists."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.tune_products", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file of tiles to write or to complete"
    )
    parser.add_argument("--models", default=",".join(SHAPES), help="comma list [%(default)s]")
    every = ",".join(map(str, TIMED_ROWS))
    parser.add_argument(
        "--rows", default=every, help="comma list of the rows that tiles are chosen for [%(default)s]"
    )
    parser.add_argument("--seconds", type=float, default=150, help="time to measure for [%(default)s]")
    flags = parser.parse_args(words)
    flags.models, flags.rows = flags.models.split(","), flags.rows.split(",")
    if unknown := [model for model in flags.models if model not in TUNABLE]:
        parser.error(f"--models knows {', '.join(TUNABLE)}; got {unknown}.")
    if unknown := [rows for rows in flags.rows if rows not in every.split(",")]:
        parser.error(f"--rows knows {every}; got {unknown}.")
    flags.rows = [int(rows) for rows in flags.rows]
    return parser, flags


def main(words: Sequence[str] | None = None) -> int:
    """Runs one call; exit code 2 for bad arguments or a device without the kernels."""
    parser, flags = _arguments(words)
    if triton_support.triton is None:
        parser.error("Triton is not installed.")
    with Compilers(len(os.sched_getaffinity(0))) as compilers:
        if not torch.cuda.is_available():
            parser.error("no CUDA device.")
        device = torch.device("cuda")
        with torch.no_grad():
            tuning = tune(compilers, flags.models, flags.rows, device, flags.seconds)
    where = setting(device)
    stored = read_json(flags.output) or {}
    name = where["device_name"]
    write_json(flags.output, {**stored, name: completed(stored.get(name, {}), table(tuning))})
    write_json(flags.output.with_suffix(".timings.json"), {**where, "timings": tuning.timings})
    write_atomically(flags.output.with_suffix(".md"), report(tuning, where))
    say(report(tuning, where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
