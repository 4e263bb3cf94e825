"""Choosing the draft tree: measured accuracy of the streams, measured cost of a step, largest expected tokens per second.

Expected tokens of a step (`tree_worth.py`) divided by its seconds (`step_cost.py`) rank the candidates.

Where steps are captured, trees are grown on the device for each step anew; the fixed tree of as many nodes is then a lower bound
of what they yield. Plain decoding is always among the candidates and stays unless drafting is clearly faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import LogitsProcessorList

from .draft_settings import rank_accuracy, saved_settings, update_settings
from .draft_tree import TreeShape
from .model_context import model_context
from .step_cost import REPLAYS, captured_step_seconds, eager_step_seconds
from .tree_worth import grow_tree, lasting_tokens
from .verification import Rule

DEFAULT_NODES = {"cpu": 8, "cuda": 32}
"""Nodes of a tree on a device for which nothing was tuned."""
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""Node budgets that tuning tries with steps launched one by one."""
CAPTURED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Node budgets that it tries with captured steps; each costs the capture of a graph, and kernels of its own at the first time."""
LARGEST_ON_CPU = 32
"""Largest budget tried on a CPU, where a step's cost grows with its rows from the start."""
LARGEST_STEP = 512
"""Nodes of a captured step, all sequences together, beyond which no tree is tried: such a step computes longer than it reads."""
BEAM = 8
"""Candidates that a tree grown on the device expands at each depth."""
LOOKUP, LEAST_LOOKUP_NODES = 4, 16
"""Tokens that a grown tree may copy from the context, and nodes from which it may: a small tree has better uses for a node.
Worth 2 % of acceptance on Spider at 32 nodes, nothing on DialogSum and E2E."""
CARRYING_EIGHTHS = (4, 3, 2)
"""Eighths of a tree's nodes that carry streams where not all do. Where 16, 12 and 8 of 32 nodes carry four streams each, steps
emit 0 to 1, 1 to 2 and 1 to 5 % fewer tokens (shipped model, 24 prompts a set, CPU)."""
LEAST_LIGHTER_NODES = 8
"""Nodes from which a tree is also tried with streams at some of them alone."""
TRUST = 0.3
"""Weight of the streams' own probabilities against the calibrated rank accuracies where a tree is grown on the device."""
CONTEXT = 256
"""Committed tokens before the steps that are measured: a prompt of the benchmark's sets and half an answer."""
TIE = 0.02
"""Candidates within this share of the highest speed count as equally fast; medians of a dozen steps differ by as much."""
CAPTURED_TIE = 0.005
"""The same of captured steps: two timings of one graph in one process differed by at most 0.6 % (H200, 125M's shape)."""
LEAST_GAIN = 0.03
"""What drafting must gain over plain decoding to be chosen; less may be a loss with prompts unlike those of calibration."""


@dataclass(frozen=True)
class DraftPlan:
    """The tree a call of `generate` drafts.

    Attributes:
        shape: the tree.
        keep: nodes that survive pruning before streams are added; `None` for no pruning. A grown tree is never pruned: it holds
            the best nodes from the start.
        source: where the size came from: `tuned`, `default`, `given` or `plain`; plans that differ in it alone are equal.
        beam: candidates that a tree grown on the device expands at each depth, and children of each; 1 is a chain. `None`: the
            tree has the shape's own parents in every step. A grown tree takes from the shape its nodes and its streams.
        lookup: tokens that a grown tree may copy from the context after an n-gram seen before; 0 for none.
        trust: of a grown tree, weight of the streams' own probabilities against the calibrated rank accuracies, 0 to 1.
        carriers: nodes of a grown tree that carry streams, the likeliest; `None` for all. Where decoding goes on from another
            node, its nearest carrying ancestor's streams guess on. A step launched from Python has streams at all nodes.
    """

    shape: TreeShape
    keep: int | None = None
    source: str = field(default="given", compare=False)
    beam: int | None = None
    lookup: int = 0
    trust: float = TRUST
    carriers: int | None = None

    def __post_init__(self) -> None:
        if self.carriers is not None and not 1 <= self.carriers <= self.shape.nodes:
            raise ValueError(
                f"carriers are some of the tree's {self.shape.nodes} nodes, got {self.carriers}."
            )

    @property
    def rows(self) -> int:
        """Rows of a step in the layers that carry streams."""
        nodes = self.shape.nodes
        return nodes + (self.carriers or nodes) * self.shape.streams

    @classmethod
    def plain(cls) -> DraftPlan:
        """Returns the plan of plain decoding: a root and no streams."""
        return cls(TreeShape((-1,), 0), source="plain")


@dataclass(frozen=True)
class Candidate:
    """A plan that was measured.

    Attributes:
        plan: what is drafted.
        step_s: measured seconds of a step.
        tokens_per_step: expected tokens of a step and sequence.
    """

    plan: DraftPlan
    step_s: float
    tokens_per_step: float

    @property
    def speed(self) -> float:
        """Expected tokens a second of one sequence."""
        return self.tokens_per_step / self.step_s


@dataclass(frozen=True)
class Tuning:
    """Outcome of tuning on one device.

    Attributes:
        setting: the name it is kept under, see :func:`setting_name`.
        batch: sequences of the steps that were measured.
        context: committed tokens before them.
        candidates: what was measured, smallest first.
        chosen: one of them.
        entry: what is kept of it, see :func:`entry_of`.
    """

    setting: str
    batch: int
    context: int
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    entry: int | dict[str, int]

    @property
    def nodes(self) -> int:
        """Chosen number of nodes."""
        return self.chosen.plan.shape.nodes


def choose(candidates: Sequence[Candidate], tie: float = TIE) -> Candidate:
    """Returns the candidate with the most expected tokens a second, the smallest of a tie; plain decoding if it is hardly slower.

    Args:
        candidates: with plain decoding among them.
        tie: share of the highest speed within which speeds count as equal.
    """
    plain = next(one for one in candidates if one.plan.shape.nodes == 1)
    best = max(one.speed for one in candidates)
    if best <= (1 + LEAST_GAIN) * plain.speed:
        return plain
    tied = [one for one in candidates if one.speed >= (1 - tie) * best]
    return min(tied, key=lambda one: (one.plan.rows, -one.speed))


def device_name(device: torch.device) -> str:
    """Returns the name under which sizes are tuned: the card's, or `cpu` with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def batch_class(batch: int) -> int:
    """Returns the batch size that a batch is tuned as: the next power of two, so that few sizes need measuring."""
    return 1 << (batch - 1).bit_length()


def setting_name(model, batch: int = 1) -> str:
    """Returns what a tuned size holds for: device, dtype, the format of packed weights, and the batch above one sequence."""
    parts = [device_name(model.device), str(model.dtype).removeprefix("torch.")]
    packed = getattr(model.config, "quantization_config", None)
    if packed is not None:
        parts.append(getattr(packed, "label", "quantised"))  # another package's has none
    batch = batch_class(batch)
    return ", ".join(parts if batch == 1 else [*parts, f"batch {batch}"])


def tuned_nodes(model, batch: int = 1) -> int | None:
    """Returns the number of nodes tuned for the model's device, dtype, packing and this batch; `None` where nobody has."""
    entry = _entries(model).get(setting_name(model, batch))
    return int(entry["nodes"] if isinstance(entry, Mapping) else entry) if entry else None


def _entries(model) -> dict[str, Any]:
    return saved_settings(model).get("draft_nodes") or {}


def entry_of(plan: DraftPlan, captured: bool) -> int | dict[str, int]:
    """Returns what a checkpoint keeps of a tuned plan: its nodes and, for captured steps, streams, beam and carriers as well."""
    if not captured:
        return plan.shape.nodes
    entry = {"nodes": plan.shape.nodes, "streams": plan.shape.streams, "beam": plan.beam or 1}
    return entry if plan.carriers is None else {**entry, "carriers": plan.carriers}


def plan_for(model, draft_nodes: int | None = None, batch: int = 1) -> DraftPlan:
    """Returns the draft plan of a model on its device.

    Args:
        model: decoder with streams.
        draft_nodes: node budget; `None` takes what was tuned for this device and batch size, else for the next smaller batch that
            was, else a default, these two cut to the rows of a step that is worth its time. One node drafts nothing.
        batch: sequences of the call.
    """
    if draft_nodes is not None:
        return _saved_plan(model, draft_nodes, "given")
    size, entries = batch_class(batch), _entries(model)
    smaller = (size >> shift for shift in range(size.bit_length())) if entries else ()
    known = ((one, entries.get(setting_name(model, one))) for one in smaller)
    found = next(((one, entry) for one, entry in known if entry), None)
    if found is not None and found[0] == size:
        return _saved_plan(model, found[1], "tuned")
    most = max(1, LARGEST_STEP // size) if _default_beam(model) else None
    if found is not None:
        return _saved_plan(model, found[1], "tuned", most)
    return _saved_plan(model, DEFAULT_NODES.get(model.device.type, DEFAULT_NODES["cpu"]), "default", most)


def _default_beam(model) -> int | None:
    return BEAM if model.device.type == "cuda" else None


def _saved_plan(model, entry: int | Mapping[str, int], source: str, most: int | None = None) -> DraftPlan:
    """Returns the plan of a number of nodes, or of an entry of :func:`entry_of`; of at most `most` nodes."""
    streams, carriers = model.streams.config.streams, None
    if isinstance(entry, Mapping):
        nodes, beam, carriers = entry["nodes"], entry.get("beam", BEAM), entry.get("carriers")
        streams = min(entry.get("streams", streams), streams)
    else:
        nodes, beam = entry, _default_beam(model)
    return make_plan(model, nodes if most is None else min(nodes, most), streams, beam, source, carriers)


def make_plan(
    model, nodes: int, streams: int, beam: int | None, source: str = "given", carriers: int | None = None
) -> DraftPlan:
    """Returns a plan of so many nodes and streams; without `beam` its tree is fixed and has no stream that it cannot use."""
    if nodes == 1:
        return replace(DraftPlan.plain(), source=source)
    accuracy = tuple(tuple(ranks) for ranks in rank_accuracy(model))
    shape = _shape(accuracy, nodes, streams, beam)
    keep = max(1, nodes // 2) if model.streams.config.pruning_rank else None
    lookup = LOOKUP if beam is not None and beam > 1 and nodes >= LEAST_LOOKUP_NODES else 0
    trust = saved_settings(model).get("trust", TRUST)
    if carriers is not None and (beam is None or carriers >= shape.nodes):
        carriers = None
    return DraftPlan(shape, keep, source, beam, lookup, trust, carriers)


@lru_cache(maxsize=64)
def _shape(accuracy: tuple[tuple[float, ...], ...], nodes: int, streams: int, beam: int | None) -> TreeShape:
    """Returns the tree of a plan; kept, because every call of `generate` asks for it."""
    if beam is None:
        return grow_tree(accuracy, nodes, streams)[0]
    shape, _ = grow_tree([ranks[:beam] for ranks in accuracy], nodes, streams)
    # A tree grown on the device may be deeper than the fixed one of as many nodes.
    return TreeShape(shape.parents, min(streams, shape.nodes - 1))


def tune(model, sizes: Sequence[int] | None = None, context: int = CONTEXT, batch: int = 1) -> Tuning:
    """Measures steps of several trees on the model's device and returns the one with the most expected tokens a second.

    Steps are measured as they will run: captured where that is possible. The model's `generation_config` is updated in memory;
    `save_pretrained` keeps it.

    Args:
        model: decoder with streams.
        sizes: node budgets to try, plain decoding (1) besides; by default those that suit the device and the batch.
        context: committed tokens before the step; cut to the positions the model has.
        batch: sequences; tuned as the next power of two.

    Raises:
        ValueError: a size that no captured step can have.
    """
    with model_context(model):
        return _tune(model, sizes, batch, context)


def _tune(model, sizes: Sequence[int] | None, batch: int, context: int) -> Tuning:
    batch, captured = batch_class(batch), captures_steps(model)
    replays = REPLAYS if captured else 1
    room = (replays + 1) * (model.streams.config.streams + 1)
    context = max(1, min(context, model.config.max_position_embeddings - room))
    plans = _captured_plans(model, sizes, batch) if captured else _fixed_plans(model, sizes)
    cost = _measure_what_fits(model, plans, context, batch, captured)
    if captured:
        for variants in (_shallower, _lighter):
            plans = variants(model, _candidates(model, cost))
            cost |= _measure_what_fits(model, plans, context, batch, captured, allow_none=True)
    candidates = _candidates(model, cost)
    chosen = choose(candidates, CAPTURED_TIE if captured else TIE)
    setting, entry = setting_name(model, batch), entry_of(chosen.plan, captured)
    update_settings(model, draft_nodes={**_entries(model), setting: entry})
    return Tuning(setting, batch, context, candidates, chosen, entry)


def captures_steps(model) -> bool:
    """Returns whether the model's steps, with drafts and greedily, run as captured graphs."""
    from .graph_runner import uncaptured_reason  # which needs this module

    plan = make_plan(model, 2, 1, BEAM)
    return uncaptured_reason(model, plan, Rule(LogitsProcessorList())) is None


def _fixed_plans(model, sizes: Sequence[int] | None) -> list[DraftPlan]:
    if sizes is None:
        sizes = [nodes for nodes in SIZES if model.device.type != "cpu" or nodes <= LARGEST_ON_CPU]
    # A budget beyond the largest tree there is gives the same tree again.
    streams = model.streams.config.streams
    return list(dict.fromkeys(make_plan(model, nodes, streams, None) for nodes in sorted({1, *sizes})))


def _captured_plans(model, sizes: Sequence[int] | None, batch: int) -> list[DraftPlan]:
    """Returns trees with all streams, and a chain, which a tree of as many nodes has to beat."""
    streams, largest = model.streams.config.streams, CAPTURED_SIZES[-1]
    if sizes is None:
        most = min(largest, LARGEST_STEP // batch)
        sizes = [nodes for nodes in (*CAPTURED_SIZES, streams + 1) if nodes <= most]
    elif max(sizes) > largest:
        raise ValueError(f"a captured tree has at most {largest} nodes, got {max(sizes)}.")
    sizes = sorted({1, *sizes})
    plans = [make_plan(model, nodes, streams, BEAM) for nodes in sizes]
    chain = min(streams + 1, sizes[-1])
    if chain > 2:  # two nodes are a chain already
        plans.append(make_plan(model, chain, streams, 1))
    return plans


def _shallower(model, candidates: Sequence[Candidate]) -> list[DraftPlan]:
    """Returns the two fastest trees with half the streams: fewer rows a node, no deep guesses."""
    half = -(-model.streams.config.streams // 2)
    trees = [one for one in candidates if one.plan.beam == BEAM and one.plan.shape.streams > half]
    fastest = sorted(trees, key=lambda one: -one.speed)[:2]
    return list(dict.fromkeys(make_plan(model, one.plan.shape.nodes, half, BEAM) for one in fastest))


def _lighter(model, candidates: Sequence[Candidate]) -> list[DraftPlan]:
    """Returns the two fastest trees with streams at some of their nodes."""
    trees = [
        one for one in candidates if one.plan.beam == BEAM and one.plan.shape.nodes >= LEAST_LIGHTER_NODES
    ]
    fastest = sorted(trees, key=lambda one: -one.speed)[:2]
    return [
        replace(one.plan, carriers=one.plan.shape.nodes * eighths // 8)
        for one in fastest
        for eighths in CARRYING_EIGHTHS
    ]


def _candidates(model, cost: Mapping[DraftPlan, float]) -> tuple[Candidate, ...]:
    accuracy = rank_accuracy(model)
    measured = [
        Candidate(plan, cost[plan], lasting_tokens(accuracy, plan.shape, plan.carriers)) for plan in cost
    ]
    return tuple(sorted(measured, key=lambda one: (one.plan.shape.nodes, one.plan.rows, one.plan.beam or 0)))


def _measure_what_fits(
    model, plans: Sequence[DraftPlan], context: int, batch: int, captured: bool, allow_none: bool = False
) -> dict[DraftPlan, float]:
    """Returns the seconds of a step by plan, without the largest where these exceed the device's memory."""
    measure = captured_step_seconds if captured else eager_step_seconds
    left = sorted(plans, key=lambda plan: plan.rows)
    while left:
        try:
            return measure(model, left, context, batch)
        except torch.OutOfMemoryError:
            if len(left) == 1 and not allow_none:
                raise
        left.pop()
    return {}
