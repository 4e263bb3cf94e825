"""Choosing the draft tree: measured accuracy of the streams, measured cost of a step, largest expected tokens per second.

A node is worth the probability that decoding passes through it: the product of its path's accuracies. The best tree of n nodes
holds the n worthiest, and worth never grows with depth, so it is grown greedily. Expected tokens a step are the sum of the
worths (the root's 1 is the bonus token); divided by the step's seconds for n nodes they rank the sizes.

A step's seconds are measured where the model will run. Sizes take turns, so that a busy moment of the machine meets all alike.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from ..cache_utils import StaticTreeCache
from ..integrations.packed_linear import pack_linears
from .decode_step import DecodeState, decode_step
from .draft_sources import StreamSource
from .draft_tree import TreeShape
from .step_record import PhaseTimer
from .verification import Rule

UNCALIBRATED = (0.6, 0.15, 0.06, 0.03)
"""Rank accuracies assumed for every stream of a model that was never calibrated."""
DEFAULT_NODES = {"cpu": 8, "cuda": 32}
"""Nodes of a tree on a device for which nothing was tuned."""
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""Node budgets that tuning tries."""
LARGEST_ON_CPU = 32
"""Largest of them tried on a CPU, where a step's cost grows with its rows from the start."""
BEAM = 8
"""Candidates that a tree grown on the device expands at each depth."""
CONTEXT = 256
"""Committed tokens before the steps that are measured: a prompt of the benchmark's sets and half an answer."""
WARMUP_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 2, 5, 12
BUDGET_S = 4.0
"""Seconds after which no further round of measuring starts, once there are `LEAST_ROUNDS`."""
TIE = 0.02
"""Sizes within this share of the highest speed count as equally fast; medians of a dozen steps differ by as much."""
CONFIG_KEY = "spec_stream"
"""Name under which `generation_config.json` keeps accuracies and tuned sizes."""


@dataclass(frozen=True)
class DraftPlan:
    """The tree a call of `generate` drafts.

    Attributes:
        shape: the tree.
        keep: nodes that survive pruning before streams are added; `None` for no pruning.
        source: where the size came from: `tuned`, `default`, `given` or `plain`.
        beam: candidates that a tree grown on the device expands at each depth, and children of each; 1 is a chain. `None`: the
            tree has the shape's own parents in every step. A grown tree takes from the shape its nodes and its streams.
        lookup: tokens that a grown tree may copy from the context after an n-gram seen before; 0 for none.
    """

    shape: TreeShape
    keep: int | None = None
    source: str = "given"
    beam: int | None = None
    lookup: int = 0

    @classmethod
    def plain(cls) -> DraftPlan:
        """Returns the plan of plain decoding: a root and no streams."""
        return cls(TreeShape((-1,), 0), source="plain")


@dataclass(frozen=True)
class Tuning:
    """Outcome of tuning on one device.

    Attributes:
        setting: the name it is kept under, see :func:`setting_name`.
        batch: sequences of the steps that were measured.
        context: committed tokens before them.
        nodes: chosen number of nodes.
        step_s: nodes to measured seconds of a step.
        tokens_per_step: nodes to expected tokens of a step.
    """

    setting: str
    batch: int
    context: int
    nodes: int
    step_s: dict[int, float]
    tokens_per_step: dict[int, float]

    def speeds(self) -> dict[int, float]:
        """Returns expected tokens a second by number of nodes, all sequences together."""
        return {
            nodes: self.batch * self.tokens_per_step[nodes] / seconds
            for nodes, seconds in self.step_s.items()
        }


def grow_tree(accuracy: Sequence[Sequence[float]], max_nodes: int, streams: int) -> tuple[TreeShape, float]:
    """Returns the tree of at most `max_nodes` nodes with the most expected tokens, and that number.

    Args:
        accuracy: accuracy[j][r], probability that rank r of stream j + 1 is right, given that the path to it is.
        max_nodes: node budget, root included.
        streams: streams the nodes carry; also the largest depth.

    Raises:
        ValueError: no room for the root, or no accuracies.
    """
    if max_nodes < 1:
        raise ValueError(f"a draft tree has at least its root; got a budget of {max_nodes} nodes.")
    if streams and not accuracy:
        raise ValueError("streams need rank accuracies; calibrate the model with train_spec_stream.py.")
    depth_limit = min(streams, len(accuracy))
    # An entry is (-worth, depth, path of ranks); shallower and better-ranked paths win ties.
    heap: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    chosen: list[tuple[int, ...]] = []
    expected = 0.0
    while heap and len(chosen) < max_nodes:
        worth, depth, path = heapq.heappop(heap)
        chosen.append(path)
        expected -= worth
        if depth < depth_limit:
            heapq.heappush(heap, (worth * accuracy[depth][0], depth + 1, (*path, 0)))
        if path and path[-1] + 1 < len(accuracy[depth - 1]):
            parent_worth = worth / max(accuracy[depth - 1][path[-1]], 1e-12)
            sibling = accuracy[depth - 1][path[-1] + 1]
            heapq.heappush(heap, (parent_worth * sibling, depth, (*path[:-1], path[-1] + 1)))
    ordered = sorted(chosen, key=lambda path: (len(path), path))
    index = {path: node for node, path in enumerate(ordered)}
    parents = tuple(index[path[:-1]] if path else -1 for path in ordered)
    deepest = max(len(path) for path in ordered)
    return TreeShape(parents, deepest), expected


def choose_tree(
    accuracy: Sequence[Sequence[float]], step_cost: Mapping[int, float], streams: int
) -> tuple[TreeShape, dict[int, float]]:
    """Returns the tree with the most expected tokens a second, the smallest of a tie, and the expected tokens of each size.

    Args:
        accuracy: as in :func:`grow_tree`.
        step_cost: nodes to measured seconds of a step.
        streams: largest depth.
    """
    grown = {nodes: grow_tree(accuracy, nodes, streams) for nodes in step_cost}
    speeds = {nodes: grown[nodes][1] / seconds for nodes, seconds in step_cost.items()}
    enough = (1 - TIE) * max(speeds.values())
    best = min(nodes for nodes, speed in speeds.items() if speed >= enough)
    return grown[best][0], {nodes: expected for nodes, (_, expected) in grown.items()}


def saved_settings(model) -> dict[str, Any]:
    """Returns what the checkpoint's `generation_config.json` says of drafting; empty if nothing."""
    return dict(getattr(model.generation_config, CONFIG_KEY, None) or {})


def update_settings(model, **values: Any) -> None:
    """Adds to what the model's `generation_config` says of drafting; `save_pretrained` then keeps it."""
    setattr(model.generation_config, CONFIG_KEY, {**saved_settings(model), **values})
    # Upstream drops everything it does not know from a generation configuration that it derived itself.
    model.generation_config._from_model_config = False


def rank_accuracy(model) -> list[list[float]]:
    """Returns the calibrated accuracy of each stream and rank, or a cautious guess for a model never calibrated."""
    saved = saved_settings(model).get("rank_accuracy")
    return saved or [list(UNCALIBRATED)] * model.streams.config.streams


def device_name(device: torch.device) -> str:
    """Returns the name under which sizes are tuned: the card's, or `cpu` with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def batch_class(batch: int) -> int:
    """Returns the batch size that a batch is tuned as: the next power of two, so that few sizes need measuring."""
    return 1 << (batch - 1).bit_length()


def setting_name(model, batch: int = 1) -> str:
    """Returns what a tuned size holds for: device, dtype and, above one sequence, the batch."""
    parts = [device_name(model.device), str(model.dtype).removeprefix("torch.")]
    batch = batch_class(batch)
    return ", ".join(parts if batch == 1 else [*parts, f"batch {batch}"])


def tuned_nodes(model, batch: int = 1) -> int | None:
    """Returns the number of nodes tuned for the model's device, dtype and this batch size; `None` where nobody has."""
    return saved_settings(model).get("draft_nodes", {}).get(setting_name(model, batch))


def plan_for(model, draft_nodes: int | None = None, batch: int = 1) -> DraftPlan:
    """Returns the draft plan of a model on its device.

    Args:
        model: decoder with streams.
        draft_nodes: node budget; `None` takes what was tuned for this device and batch size, else for one sequence, else a
            default.
        batch: sequences of the call.
    """
    streams = model.streams.config.streams
    source = "given"
    if draft_nodes is None:
        tuned = tuned_nodes(model, batch) or tuned_nodes(model)
        source = "tuned" if tuned else "default"
        draft_nodes = tuned or DEFAULT_NODES.get(model.device.type, DEFAULT_NODES["cpu"])
    shape, _ = grow_tree(rank_accuracy(model), draft_nodes, streams)
    beam = BEAM if model.device.type == "cuda" else None
    return DraftPlan(shape, _kept(model, draft_nodes), source, beam)


def _kept(model, nodes: int) -> int | None:
    return max(1, nodes // 2) if model.streams.config.pruning_rank else None


def tune(model, sizes: Sequence[int] | None = None, context: int = CONTEXT, batch: int = 1) -> Tuning:
    """Measures steps of several tree sizes on the model's device and returns the size with the most expected tokens a second.

    The model's `generation_config` is updated in memory; `save_pretrained` keeps it.

    Args:
        model: decoder with streams.
        sizes: node budgets to try; by default those of `SIZES` that suit the device. Larger than any tree: left out.
        context: committed tokens before the step; cut to the positions the model has.
        batch: sequences; tuned as the next power of two.
    """
    streams = model.streams.config.streams
    accuracy = rank_accuracy(model)
    if sizes is None:
        sizes = [nodes for nodes in SIZES if model.device.type != "cpu" or nodes <= LARGEST_ON_CPU]
    context = max(1, min(context, model.config.max_position_embeddings - 2 * streams - 2))
    grown = {nodes: grow_tree(accuracy, nodes, streams)[0] for nodes in sorted(set(sizes))}
    # A budget beyond the largest tree there is gives the same tree again.
    shapes = {shape.nodes: shape for shape in grown.values()}
    cost = _measure_what_fits(model, shapes, context, batch_class(batch))
    best, expected = choose_tree(accuracy, cost, streams)
    setting = setting_name(model, batch)
    tuned = {**saved_settings(model).get("draft_nodes", {}), setting: best.nodes}
    update_settings(model, draft_nodes=tuned)
    return Tuning(setting, batch_class(batch), context, best.nodes, cost, expected)


def _measure_what_fits(model, shapes: Mapping[int, TreeShape], context: int, batch: int) -> dict[int, float]:
    """Returns the seconds of a step by size, without the largest sizes where these exceed the device's memory."""
    left = dict(shapes)
    while True:
        try:
            return measure_steps(model, left, context, batch)
        except torch.OutOfMemoryError:
            if len(left) == 1:
                raise
            del left[max(left)]


@torch.no_grad()
def measure_steps(model, shapes: Mapping[int, TreeShape], context: int, batch: int) -> dict[int, float]:
    """Returns the seconds of a decode step with each of the shapes, the median over rounds.

    Tokens and stream states are arbitrary: a step's cost does not depend on them.

    Args:
        model: decoder with streams.
        shapes: trees by size.
        context: committed tokens before the step.
        batch: sequences.
    """
    pack_linears(model)
    deepest = max(shape.depth for shape in shapes.values())
    rows = max(shape.rows for shape in shapes.values())
    cache = StaticTreeCache.for_model(model, batch, context + deepest + 1, rows)
    return interleaved_medians(
        sorted(shapes), lambda nodes: _step_seconds(model, cache, shapes[nodes], context, batch)
    )


def interleaved_medians(
    sizes: Sequence[int], step: Callable[[int], float], clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Returns the median seconds of each size's steps, measured in rounds over all sizes.

    Args:
        sizes: what to measure.
        step: does a step of this size and returns its seconds.
        clock: tells when the time for further rounds is up.
    """
    started = clock()
    samples: dict[int, list[float]] = {nodes: [] for nodes in sizes}
    for turn in range(WARMUP_ROUNDS + MOST_ROUNDS):
        if turn >= WARMUP_ROUNDS + LEAST_ROUNDS and clock() - started > BUDGET_S:
            break
        for nodes in sizes:
            seconds = step(nodes)
            if turn >= WARMUP_ROUNDS:
                samples[nodes].append(seconds)
    return {nodes: statistics.median(taken) for nodes, taken in samples.items()}


def _step_seconds(model, cache: StaticTreeCache, shape: TreeShape, context: int, batch: int) -> float:
    device = model.device
    hidden = (batch, max(shape.streams, 1), model.config.hidden_size)
    state = DecodeState(
        root=torch.zeros(batch, dtype=torch.int64, device=device),
        lengths=torch.full((batch,), context, device=device),
        finished=torch.zeros(batch, dtype=torch.bool, device=device),
        # Not drawn: sampling that follows must not depend on whether there was tuning.
        stream_hidden=torch.zeros(hidden, dtype=model.dtype, device=device),
        histories=[],
        longest=context,
        shortest=context,
    )
    keep = _kept(model, shape.nodes)
    keep = keep if keep is not None and keep < shape.nodes else None
    started = _now(device)
    out = decode_step(
        model,
        cache,
        state,
        shape,
        Rule(LogitsProcessorList()),
        StreamSource(),
        PhaseTimer(device, False),
        keep,
    )
    out.packed.tolist()
    return _now(device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
