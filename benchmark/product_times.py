"""Times of single products with packed weights, beside the vendor's half-precision product and the peers' packed ones.

    python -m benchmark.product_times --output_dir results/products

Products are those of published decoders as the engine uses them: query, key and value in one, a gated MLP's two in one. Weights
are random. Copies of a weight take turns until they exceed twice the second-level cache, and one graph runs all of them: what
is timed is neither launches nor cached weights. Writes `products.json` and `products.md`.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmark.device_times import copy_bandwidth, run, setting, timed
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight, quantized_linear
from huggingface.transformers.quantizers.packing import WeightFormat

ROWS = (1, 33, 64)
"""One token, and the rows of small and larger draft trees."""
BASELINE = "bf16"
FORMATS = {"int8": WeightFormat(8), "int4": WeightFormat(4, 128)}
PEERS = {"bnb_nf4": "bitsandbytes", "torchao_int4": "torchao"}
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One product: outputs and inputs, and whether the second half of the outputs is multiplied with the activated first."""

    outputs: int
    inner: int
    gated: bool = False


SHAPES = {
    "mistral_7b": {
        "qkv": Shape(6144, 4096), "out": Shape(4096, 4096), "gate_up": Shape(28672, 4096, True), "down": Shape(4096, 14336),
    },
    "llama_3.2_3b": {
        "qkv": Shape(5120, 3072), "out": Shape(3072, 3072), "gate_up": Shape(16384, 3072, True), "down": Shape(3072, 8192),
    },
}  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Runs one call; exit code 2 for bad arguments or a device without the kernels."""
    return run("benchmark.product_times", str(__doc__), SHAPES, "products", measure, report, words)


def measure(names: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields, after each product, everything that is measured so far, with hardware, versions and date."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    result: dict[str, Any] = {
        **setting(device),
        "dtype": "bfloat16",
        "weights": "random, published shapes",
        "bandwidth_bytes_per_s": copy_bandwidth(device),
        "cache_bytes": cache,
        "missing": {peer: package for peer, package in PEERS.items() if not _installed(package)},
        "products": [],
    }
    for name in names:
        for part, shape in SHAPES[name].items():
            times = measure_shape(shape, device, cache)
            result["products"].append({"model": name, "product": part, **times})
            yield result


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def measure_shape(shape: Shape, device: torch.device, cache_bytes: int) -> dict[str, Any]:
    """Returns, for each number of rows, each way's seconds a product and the bytes of a weight."""
    weight = torch.randn(shape.outputs, shape.inner, device=device, dtype=torch.bfloat16) * 0.02
    rows: dict[str, dict[str, Any]] = {}
    for way in (BASELINE, *FORMATS, *(peer for peer, package in PEERS.items() if _installed(package))):
        first, stored = product_of(way, weight, shape.gated)
        copies = [first] + [product_of(way, weight, shape.gated)[0] for _ in range(2 * cache_bytes // stored)]
        for count in ROWS:
            inputs = torch.randn(1, count, shape.inner, device=device, dtype=torch.bfloat16)
            seconds = graph_seconds(copies, inputs)
            rows.setdefault(str(count), {})[way] = {"s": seconds, "bytes_per_s": stored / seconds}
        del copies, first
        torch.cuda.empty_cache()
    return {"outputs": shape.outputs, "inner": shape.inner, "rows": rows}


def product_of(way: str, weight: torch.Tensor, gated: bool = False) -> tuple[Product, int]:
    """Returns a product with a copy of a (out, in) bfloat16 weight stored some way, and the bytes it is stored in.

    Ours includes a gate, which costs the others further kernels that are not timed.
    """
    if way == BASELINE:
        copy = weight.clone()
        return lambda rows: F.linear(rows, copy), copy.nbytes
    if way in FORMATS:
        packed = QuantizedWeight.of(weight, FORMATS[way])
        stored = sum(tensor.nbytes for tensor in packed.tensors().values())
        activation = "silu" if gated else None
        return lambda rows: quantized_linear(rows, packed, activation=activation, gated=gated), stored
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    return _nf4(linear, weight.device) if way == "bnb_nf4" else _torchao(linear)


def _nf4(linear: torch.nn.Linear, device: torch.device) -> tuple[Product, int]:
    import bitsandbytes as bnb  # type: ignore[import-not-found]  # optional, not installed beside the type checker

    outputs, inner = linear.weight.shape
    layer = bnb.nn.Linear4bit(inner, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    layer = layer.to(device)
    return layer, layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes


def _torchao(linear: torch.nn.Linear) -> tuple[Product, int]:
    from torchao.quantization import (  # type: ignore[import-not-found]  # optional, as above
        Int4WeightOnlyConfig,
        quantize_,
    )

    quantize_(linear, Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"))
    outputs, inner = linear.weight.shape
    return linear, outputs * inner // 2 + outputs * inner // 128 * 4


def graph_seconds(copies: Sequence[Product], rows: torch.Tensor) -> float:
    """Returns the seconds of one product, from one graph of all copies."""
    for product in copies:
        product(rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in copies:
            product(rows)
    return timed(graph.replay) / len(copies)


def speedups(result: dict[str, Any], way: str, rows: int) -> list[float]:
    """Returns how much faster than the half-precision product a way is, for each product."""
    cells = [product["rows"][str(rows)] for product in result["products"]]
    return [cell[BASELINE]["s"] / cell[way]["s"] for cell in cells if way in cell]


def geometric_mean(values: Sequence[float]) -> float:
    """Returns the geometric mean of numbers above 0."""
    return math.exp(sum(map(math.log, values)) / len(values))


def report(result: dict[str, Any]) -> str:
    """Returns the figures as Markdown."""
    rate = result["bandwidth_bytes_per_s"] / 1e12
    ways = list(result["products"][0]["rows"][str(ROWS[0])])
    lines = [
        f"{result['device_name']}, {result['dtype']}, {result['weights']}, {result['date'][:10]}; torch {result['torch']}, "
        f"triton {result['triton']}. A large copy moves {rate:.2f} TB/s. int4: groups of 128.",
        "",
        f"Over the {BASELINE} product, geometric mean over {len(result['products'])} products:",
        "",
        f"| rows | {' | '.join(ways[1:])} |",
        f"| ---: |{' ---: |' * len(ways[1:])}",
    ]
    for rows in ROWS:
        means = [f"{geometric_mean(speedups(result, way, rows)):.2f}" for way in ways[1:]]
        lines.append(f"| {rows} | {' | '.join(means)} |")
    lines += ["", f"| model | product | rows | {' | '.join(f'{way}, us (TB/s)' for way in ways)} |"]
    lines.append(f"| --- | --- | ---: |{' ---: |' * len(ways)}")
    for product in result["products"]:
        name = f"{product['product']} {product['outputs']} x {product['inner']}"
        for rows, cell in product["rows"].items():
            parts = [
                f"{cell[way]['s'] * 1e6:.1f} ({cell[way]['bytes_per_s'] / 1e12:.2f})" if way in cell else ""
                for way in ways
            ]
            lines.append(f"| {product['model']} | {name} | {rows} | {' | '.join(parts)} |")
    for peer, package in result["missing"].items():
        lines += ["", f"{peer} was not measured: {package} is not installed."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
