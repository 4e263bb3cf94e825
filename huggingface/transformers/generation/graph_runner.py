"""Captured decoding: one step, one CUDA graph.

Launching a step's two hundred kernels from Python takes longer than running them. A graph is launched at once, and what varies
between steps (lengths, the tree, tokens) is read from fixed buffers, so one capture serves every step of every call of that
geometry: (batch, capacity, draft plan, sampling). Prompts are padded to a bucket, with a graph for each.

The host reads a step's tokens from pinned memory as soon as `verify` has them; the copy and its event are a branch of the graph,
beside which the device commits and drafts. Where the tokens say that there is a next step, it is launched before the host does
anything else with them. Plain decoding has nothing to do in the meantime, so it runs one step ahead of the host instead; two
graphs take turns, so that no unread token is written over. A prompt comes from pinned memory within its graph, and its first
token leaves like a step's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers.generation.logits_process import EtaLogitsWarper

from ..integrations import triton_support
from ..integrations.compile_ahead import compile_ahead
from ..models.spec_stream.model_state import state_of, weights_of
from .step_record import PhaseTimer
from .tree_tuning import DraftPlan
from .verification import Rule

SMALLEST_PROMPT, SMALLEST_CAPACITY = 64, 512
"""Least tokens a prompt is padded to, and least committed rows of a cache; both grow by powers of two."""
KEPT = 3
"""Runners a model keeps: a benchmark's batch sizes come one after another, plain and drafting in turns."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute in."""
LARGEST_TREE = 64
"""Nodes whose ancestors fit one 64-bit word."""


def uncaptured_reason(model: Any, plan: DraftPlan, rule: Rule) -> str | None:
    """Returns why decoding cannot be captured, or `None` if it can."""
    device = model.device
    if device.type != "cuda":
        return f"graphs are CUDA's, the model is on {device.type}"
    reason = triton_support.unavailable(device) or state_of(model).reason
    if reason is not None:
        return reason
    if model.dtype not in DTYPES:
        return f"no kernel knows {model.dtype}"
    if torch.is_autocast_enabled(device.type):
        return "autocast is on, and captured steps compute in the model's own dtype"
    if any(isinstance(processor, EtaLogitsWarper) for processor in rule.processors):
        return "eta_cutoff asks the device for a number, which no capture may do"
    if rule.needs_prefixes:
        return "a logits processor looks at the tokens before, on the host"
    if plan.shape.nodes > LARGEST_TREE:
        return f"a captured tree has at most {LARGEST_TREE} nodes, not {plan.shape.nodes}"
    if plan.shape.nodes > 1 and plan.beam is None:
        return "the plan has a fixed tree, captured trees grow on the device"
    if plan.shape.nodes > 1 and not plan.shape.streams:
        return "captured trees are drafted by streams, the plan has none"
    return None


@dataclass(frozen=True)
class Geometry:
    """What a captured step is made for.

    Attributes:
        batch: sequences.
        capacity: committed rows a sequence can have.
        longest_prompt: tokens of the longest bucket.
        plan: what is drafted.
        rule: name of how tokens are picked.
        phases: one graph a phase, each timed, instead of one a step.
        weights: tells one state of the model from another.
    """

    batch: int
    capacity: int
    longest_prompt: int
    plan: DraftPlan
    rule: str
    phases: bool
    weights: tuple[int, int]


def geometry_of(
    model: Any, batch: int, longest: int, room: int, plan: DraftPlan, rule: Rule, phases: bool
) -> Geometry:
    """Returns the geometry that serves prompts of `longest` tokens and `room` new ones."""
    limit = model.config.max_position_embeddings
    return Geometry(
        batch=batch,
        capacity=_bucket(min(longest + room, limit), SMALLEST_CAPACITY),
        longest_prompt=min(_bucket(longest, SMALLEST_PROMPT), limit),
        plan=plan,
        rule=repr([(type(one).__name__, sorted(vars(one).items(), key=str)) for one in rule.processors])
        + str(rule.do_sample),
        phases=phases,
        weights=weights_of(model),
    )


def _bucket(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


class _Runners(OrderedDict):
    """A model's runners, the latest last; a copy of the model starts without any."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Runners:
        return _Runners()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Runners, ()


def runner_for(model: Any, geometry: Geometry, rule: Rule) -> GraphRunner:
    """Returns the model's runner of a geometry; captures it where there is none yet."""
    runners = model.__dict__.setdefault("_graph_runners", _Runners())
    for known in [known for known in runners if known.weights != geometry.weights]:
        del runners[known]  # it serves nobody any more, and may hold weights as they were
    serving = [known for known in runners if _serves(known, geometry)]
    if serving:
        runners.move_to_end(serving[0])
        return runners[serving[0]]
    while len(runners) >= KEPT:
        runners.popitem(last=False)
    runners[geometry] = GraphRunner(model, geometry, rule)
    return runners[geometry]


def _serves(known: Geometry, wanted: Geometry) -> bool:
    return (
        (known.batch, known.plan, known.rule, known.phases, known.weights)
        == (wanted.batch, wanted.plan, wanted.rule, wanted.phases, wanted.weights)
        and known.capacity >= wanted.capacity
        and known.longest_prompt >= wanted.longest_prompt
    )


@dataclass
class _Outlet:
    """Where the host reads a pass: pinned numbers, and the event after which they are there."""

    tokens: torch.Tensor
    ready: Any


@dataclass
class _Prefill:
    """A captured prompt pass.

    Attributes:
        prompts, lengths: (batch, seq) and (batch,) int64, pinned, for the host to fill in.
        held: where the graph copies them to; a graph knows nothing but addresses, so that somebody must keep it.
        graph: the pass.
    """

    prompts: torch.Tensor
    lengths: torch.Tensor
    held: torch.Tensor
    graph: Any


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream that a device's graphs are captured on; torch's own is that of the device which captured first."""
    return torch.cuda.Stream(device)


class GraphRunner:
    """Captured prefill and steps of one geometry.

    Attributes:
        capture_s: seconds that capturing took, compilation of kernels included.
        capture_bytes: device memory that buffers and graphs hold.
    """

    def __init__(self, model: Any, geometry: Geometry, rule: Rule):
        from .fused_step import FusedStep

        started, reserved = time.perf_counter(), torch.cuda.memory_reserved(model.device)
        self.device = model.device
        self.geometry = geometry
        self.step_buffers = FusedStep(model, geometry.batch, geometry.capacity, geometry.plan, rule)
        self.ahead = 0 if geometry.plan.shape.nodes > 1 or geometry.phases else 1
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(self.device)
        self._first = self._outlet(self.step_buffers.first)
        self._outlets = [self._outlet(self.step_buffers.packed) for _ in range(self.ahead + 1)]
        # What a sampled call draws must not depend on whether it found its graphs made.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            compile_ahead(self.device, [self._all_passes])
            self._prefills = {seq: self._capture_prefill(seq) for seq in self._buckets()}
            self._steps = [self._capture_step(outlet) for outlet in self._outlets]
        self._issued = self._read = 0
        torch.cuda.synchronize(self.device)
        self.capture_s = time.perf_counter() - started
        self.capture_bytes = torch.cuda.memory_reserved(self.device) - reserved

    def _pinned(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64).pin_memory()

    def _outlet(self, source: torch.Tensor) -> _Outlet:
        return _Outlet(self._pinned(*source.shape), torch.cuda.Event(external=True))

    def _buckets(self) -> list[int]:
        sizes = [min(SMALLEST_PROMPT, self.geometry.longest_prompt)]
        while sizes[-1] < self.geometry.longest_prompt:
            sizes.append(min(2 * sizes[-1], self.geometry.longest_prompt))
        return sizes

    def _all_passes(self) -> None:
        """Does what will be captured, on no prompt in particular."""
        buffers, batch = self.step_buffers, self.geometry.batch
        lengths = torch.ones(batch, dtype=torch.int64, device=self.device)
        for seq in self._buckets():
            buffers.prepare_prefill(seq)
            buffers.prefill(torch.zeros(batch, seq, dtype=torch.int64, device=self.device), lengths)
        buffers.forward()
        buffers.verify()
        buffers.commit()
        buffers.draft()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Returns the graph of some work. A run of it in front fills caches and compiles what is left; no capture may do that."""
        work()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=capture_stream(self.device)):
            work()
        return graph

    def _capture_prefill(self, seq: int) -> _Prefill:
        buffers, batch = self.step_buffers, self.geometry.batch
        # Prompts and lengths side by side: one copy.
        given = self._pinned(batch * (seq + 1))
        given[-batch:] = 1
        held = given.to(self.device, copy=True)
        buffers.prepare_prefill(seq)

        def work() -> None:
            held.copy_(given, non_blocking=True)
            buffers.prefill(held[:-batch].view(batch, seq), held[-batch:])
            self._publish(buffers.first, self._first)
            buffers.draft()
            torch.cuda.current_stream(self.device).wait_stream(self._side)

        return _Prefill(given[:-batch].view(batch, seq), given[-batch:], held, self._capture(work))

    def _capture_step(self, outlet: _Outlet) -> list[tuple[str, torch.cuda.CUDAGraph]]:
        buffers = self.step_buffers
        if self.geometry.phases:
            # Plain decoding commits nothing, and CUDA warns of empty graphs.
            drafts = buffers.nodes > 1
            phases = ("forward", "verify", "commit", "draft") if drafts else ("forward", "verify", "draft")
            return [(phase, self._capture(getattr(buffers, phase))) for phase in phases]

        def work() -> None:
            buffers.forward()
            buffers.verify()
            self._publish(buffers.packed, outlet)
            buffers.commit()
            buffers.draft()
            torch.cuda.current_stream(self.device).wait_stream(self._side)

        return [("step", self._capture(work))]

    def _publish(self, source: torch.Tensor, outlet: _Outlet) -> None:
        """Copies what a pass has found to the host on a branch beside what follows."""
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):
            outlet.tokens.copy_(source, non_blocking=True)
            outlet.ready.record()

    def prefill(self, prompts: torch.Tensor, lengths: torch.Tensor) -> tuple[list[int], bool]:
        """Starts anew with (batch, seq) prompts of (batch,) lengths; returns first tokens and whether all logits were finite."""
        seq = min(size for size in self._prefills if size >= prompts.shape[1])
        prefill = self._prefills[seq]
        # The graph before has read what is written over here: its first tokens, which come after, have been waited for.
        prefill.prompts[:, : prompts.shape[1]] = prompts
        prefill.lengths[:] = lengths
        self._issued = self._read = 0
        prefill.graph.replay()
        self._first.ready.synchronize()
        first = self._first.tokens.tolist()
        return [token for token, _ in first], all(finite for _, finite in first)

    def step(
        self, wanted: int, timer: PhaseTimer, goes_on: Callable[[list[list[int]]], bool] | None = None
    ) -> list[list[int]]:
        """Runs a step and returns what each sequence emitted.

        Args:
            wanted: steps that the caller will still ask for unless a sequence ends; none beyond them is started ahead.
            timer: takes the phases' seconds, where they are captured apart.
            goes_on: says of what each sequence emitted whether the caller will ask for a step more, which then starts at once.
        """
        if self.geometry.phases:
            for phase, graph in self._steps[0]:
                with timer.time(phase):
                    graph.replay()
            packed = self.step_buffers.packed.tolist()
        else:
            self._issue(self._read + min(self.ahead, wanted - 1))
            outlet = self._outlets[self._read % len(self._outlets)]
            outlet.ready.synchronize()
            packed = outlet.tokens.tolist()
        self._read += 1
        emitted = [row[1 : 1 + row[0]] for row in packed]
        if not self.geometry.phases and goes_on is not None and goes_on(emitted):
            self._issue(self._read)
        return emitted

    def _issue(self, last: int) -> None:
        """Launches the steps up to that one which are not on their way."""
        while self._issued <= last:
            self._steps[self._issued % len(self._steps)][0][1].replay()
            self._issued += 1

    def replay_prefill(self, tokens: int) -> Callable[[], None]:
        """Returns what replays the prompt pass that serves `tokens` tokens, for measuring."""
        return self._prefills[min(size for size in self._prefills if size >= tokens)].graph.replay

    def replay_step(self) -> Callable[[], None]:
        """Returns what replays a step, for measuring."""
        return self._steps[0][0][1].replay

    def finish(self, finished: list[bool]) -> None:
        """Stops the growth of sequences that have ended."""
        if self.geometry.batch > 1:
            self.step_buffers.state.finished.copy_(torch.tensor(finished), non_blocking=True)


def release_runners(model: Any) -> None:
    """Frees what captured graphs hold of the device's memory."""
    # The layers would keep their weights on the device when the model has left it.
    model.__dict__.pop("_fused_layers", None)
    if model.__dict__.pop("_graph_runners", None):
        torch.cuda.empty_cache()
