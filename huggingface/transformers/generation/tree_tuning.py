"""Choosing the draft tree: measured accuracy of the streams, measured cost of a step, largest expected tokens per second.

A node is worth the probability that decoding passes through it: the product of its path's accuracies. The best tree of n nodes
holds the n worthiest, and worth never grows with depth, so it is grown greedily. Expected tokens a step are the sum of the
worths (the root's 1 is the bonus token); divided by the step's seconds for n nodes they rank the sizes.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
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
CONFIG_KEY = "spec_stream"
"""Name under which `generation_config.json` keeps accuracies and tuned sizes."""


@dataclass(frozen=True)
class DraftPlan:
    """The tree a call of `generate` drafts.

    Attributes:
        shape: the tree.
        keep: nodes that survive pruning before streams are added; `None` for no pruning.
        source: where the size came from: `tuned`, `default`, `given` or `plain`.
    """

    shape: TreeShape
    keep: int | None = None
    source: str = "given"

    @classmethod
    def plain(cls) -> DraftPlan:
        """Returns the plan of plain decoding: a root and no streams."""
        return cls(TreeShape((-1,), 0), source="plain")


@dataclass(frozen=True)
class Tuning:
    """Outcome of tuning on one device.

    Attributes:
        nodes: chosen number of nodes.
        step_s: nodes to measured seconds of a step.
        tokens_per_step: nodes to expected tokens of a step.
    """

    nodes: int
    step_s: dict[int, float]
    tokens_per_step: dict[int, float]

    def speeds(self) -> dict[int, float]:
        """Returns expected tokens a second by number of nodes."""
        return {nodes: self.tokens_per_step[nodes] / seconds for nodes, seconds in self.step_s.items()}


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
    accuracy: Sequence[Sequence[float]], step_cost: dict[int, float], streams: int
) -> tuple[TreeShape, dict[int, float]]:
    """Returns the tree with the most expected tokens a second, and the expected tokens of each size.

    Args:
        accuracy: as in :func:`grow_tree`.
        step_cost: nodes to measured seconds of a step.
        streams: largest depth.
    """
    grown = {nodes: grow_tree(accuracy, nodes, streams) for nodes in step_cost}
    best = max(step_cost, key=lambda nodes: (grown[nodes][1] / step_cost[nodes], -nodes))
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


def plan_for(model, draft_nodes: int | None = None) -> DraftPlan:
    """Returns the draft plan of a model on its device.

    Args:
        model: decoder with streams.
        draft_nodes: node budget; `None` takes what was tuned for this device, else a default.
    """
    streams = model.streams.config.streams
    tuned = saved_settings(model).get("draft_nodes", {}).get(device_name(model.device))
    source = "given"
    if draft_nodes is None:
        source = "tuned" if tuned else "default"
        draft_nodes = tuned or DEFAULT_NODES.get(model.device.type, DEFAULT_NODES["cpu"])
    shape, _ = grow_tree(rank_accuracy(model), draft_nodes, streams)
    keep = max(1, draft_nodes // 2) if model.streams.config.pruning_rank else None
    return DraftPlan(shape, keep, source)


@torch.no_grad()
def measure_step(
    model, shape: TreeShape, context: int = 256, batch: int = 1, repeats: int = 12, warmup: int = 4
) -> float:
    """Returns the seconds of a decode step with this shape after `context` committed tokens, the median of `repeats`.

    Tokens are arbitrary: a step's cost does not depend on them.
    """
    pack_linears(model)
    device = model.device
    streams = model.streams.config.streams if model.streams is not None else 0
    cache = StaticTreeCache.for_model(model, batch, context + shape.depth + 1, shape.rows)
    timings = []
    for turn in range(warmup + repeats):
        state = DecodeState(
            root=torch.zeros(batch, dtype=torch.int64, device=device),
            lengths=torch.full((batch,), context, device=device),
            finished=torch.zeros(batch, dtype=torch.bool, device=device),
            stream_hidden=torch.randn(batch, max(streams, 1), model.config.hidden_size, device=device).to(
                model.dtype
            ),
            histories=[],
            longest=context,
            shortest=context,
        )
        started = _now(device)
        out = decode_step(
            model,
            cache,
            state,
            shape,
            Rule(LogitsProcessorList()),
            StreamSource(),
            PhaseTimer(device, False),
        )
        out.packed.tolist()
        if turn >= warmup:
            timings.append(_now(device) - started)
    return sorted(timings)[len(timings) // 2]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tune(model, sizes: Sequence[int] = SIZES, context: int = 256, batch: int = 1) -> Tuning:
    """Measures steps of several tree sizes on the model's device and returns the size with the most expected tokens a second.

    The model's `generation_config` is updated in memory; `save_pretrained` keeps it.
    """
    streams = model.streams.config.streams
    accuracy = rank_accuracy(model)
    context = min(context, model.config.max_position_embeddings - 2 * streams - 2)
    shapes = {nodes: grow_tree(accuracy, nodes, streams)[0] for nodes in sizes}
    cost = {
        nodes: measure_step(model, shape, context, batch)
        for nodes, shape in shapes.items()
        if shape.nodes == nodes
    }
    best, expected = choose_tree(accuracy, cost, streams)
    tuned = {**saved_settings(model).get("draft_nodes", {}), device_name(model.device): best.nodes}
    update_settings(model, draft_nodes=tuned)
    return Tuning(best.nodes, cost, expected)
