"""Seconds of a decode step, measured where the model will run and as it will run: captured, or launched one by one.

Candidates take turns, so that a busy moment of the machine meets all alike. Tokens and states are arbitrary: what a step costs
depends on how many there are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import LogitsProcessorList

from ..cache_utils import StaticTreeCache
from ..integrations.compile_ahead import compile_ahead
from ..integrations.packed_linear import pack_linears
from ..integrations.repacked_int4 import repack_linears
from .decode_step import DecodeState, decode_step
from .draft_sources import StreamSource
from .step_record import PhaseTimer
from .verification import Rule

if TYPE_CHECKING:
    from .tree_tuning import DraftPlan

WARMUP_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 2, 5, 12
BUDGET_S = 4.0
"""Seconds after which no further round of measuring starts, once there are `LEAST_ROUNDS`."""
REPLAYS = 4
"""Captured steps between two events: enough to drown the events' own time, few enough for lengths to stay where they were."""

Key = TypeVar("Key", bound=Hashable)


def interleaved_medians(
    keys: Sequence[Key], step: Callable[[Key], float], clock: Callable[[], float] = time.perf_counter
) -> dict[Key, float]:
    """Returns the median seconds of each key's steps, measured in rounds over all keys.

    Args:
        keys: what to measure.
        step: does a step of this key and returns its seconds.
        clock: tells when the time for further rounds is up.
    """
    started = clock()
    samples: dict[Key, list[float]] = {key: [] for key in keys}
    for turn in range(WARMUP_ROUNDS + MOST_ROUNDS):
        if turn >= WARMUP_ROUNDS + LEAST_ROUNDS and clock() - started > BUDGET_S:
            break
        for key in keys:
            seconds = step(key)
            if turn >= WARMUP_ROUNDS:
                samples[key].append(seconds)
    return {key: statistics.median(taken) for key, taken in samples.items()}


@torch.no_grad()
def eager_step_seconds(model, plans: Sequence[DraftPlan], context: int, batch: int) -> dict[DraftPlan, float]:
    """Returns the seconds of a decode step launched from Python with the tree of each plan, the median over rounds.

    Args:
        model: decoder with streams.
        plans: what to draft; their fixed trees.
        context: committed tokens before the step.
        batch: sequences.
    """
    pack_linears(model)
    repack_linears(model)
    deepest = max(plan.shape.depth for plan in plans)
    rows = max(plan.shape.rows for plan in plans)
    cache = StaticTreeCache.for_model(model, batch, context + deepest + 1, rows)
    return interleaved_medians(plans, lambda plan: _eager_step(model, cache, plan, context, batch))


def _eager_step(model, cache: StaticTreeCache, plan: DraftPlan, context: int, batch: int) -> float:
    device, shape = model.device, plan.shape
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
    keep = plan.keep if plan.keep is not None and plan.keep < shape.nodes else None
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


@torch.no_grad()
def captured_step_seconds(
    model, plans: Sequence[DraftPlan], context: int, batch: int
) -> dict[DraftPlan, float]:
    """Returns the seconds that the device takes for a captured step of each plan, the median over rounds.

    All graphs are alive at once and gone afterwards; no prompt is run and no graph of one captured.

    Args:
        model: decoder with streams whose steps can be captured.
        plans: what to draft.
        context: committed tokens before the step.
        batch: sequences.

    Raises:
        torch.OutOfMemoryError: the caches and graphs of all plans exceed the device's memory.
    """
    steps: dict[DraftPlan, _CapturedStep] = {}
    pool = torch.cuda.graph_pool_handle()
    try:
        for plan in reversed(plans):  # the largest first: if its buffers do not fit, it shows at once
            steps[plan] = _CapturedStep(model, plan, context, batch)
        compile_ahead(model.device, [step.work for step in steps.values()])
        for step in steps.values():
            step.capture(pool)
        return interleaved_medians(plans, lambda plan: steps[plan].seconds(context))
    finally:
        steps.clear()
        torch.cuda.empty_cache()


class _CapturedStep:
    """A plan's whole step, in one graph once it is captured."""

    graph: Any

    def __init__(self, model, plan: DraftPlan, context: int, batch: int):
        from .fused_step import FusedStep  # which needs the plans, and those need this module
        from .graph_runner import geometry_of

        self.device = model.device
        rule = Rule(LogitsProcessorList())
        room = (REPLAYS + 1) * (plan.shape.streams + 1)
        geometry = geometry_of(model, batch, context, room, plan, rule, False)
        self.buffers = FusedStep(model, batch, geometry.capacity, plan, rule)
        self._rewind(context)

    def capture(self, pool: Any) -> None:
        """Captures the step into a pool of graphs."""
        from .graph_runner import capture_stream

        self.work()  # fills caches, and compiles what is not compiled yet; no capture may
        torch.cuda.synchronize(self.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=capture_stream(self.device)):
            self.work()

    def work(self) -> None:
        """Does a step."""
        self.buffers.forward()
        self.buffers.verify()
        self.buffers.commit()
        self.buffers.draft()

    def _rewind(self, context: int) -> None:
        """Puts the sequences back to where the measurement starts."""
        self.buffers.state.lengths.fill_(context)
        self.buffers.state.finished.zero_()

    def seconds(self, context: int) -> float:
        """Returns the seconds of a step, the mean over a few in a row."""
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._rewind(context)
        started.record()
        for _ in range(REPLAYS):
            self.graph.replay()
        ended.record()
        ended.synchronize()
        return started.elapsed_time(ended) / 1000 / REPLAYS
