"""One call of `generate`, step by step: launched from Python, or replayed from captured graphs.

Both runs share the host's side (sequences, stop rules, statistics); they differ in who does a step.
"""

from __future__ import annotations

import random
import time
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..cache_utils import StaticTreeCache
from ..integrations.gluon_support import gluon_unavailable
from ..integrations.packed_linear import pack_linears
from ..integrations.repacked_int4 import repack_linears
from .decode_step import DecodeState, StepOutput, decode_step
from .draft_sources import DraftSource, OracleSource, StreamSource
from .graph_runner import GraphRunner, geometry_of, runner_for, uncaptured_reason
from .sequences import Sequences, stop_rule
from .step_record import GenerationStatistics, PhaseTimer, SpecGenerateOutput, StepRecord
from .tree_tuning import DraftPlan, plan_for
from .verification import Rule


@dataclass(frozen=True)
class DecodeOptions:
    """What our `generate` takes beyond upstream's.

    Attributes:
        drafts: `streams`, or `none` for plain decoding by the same loop.
        draft_nodes: nodes of the draft tree, root included; `None` takes the tuned number.
        plan: a draft plan of one's own, in place of the planned tree.
        record_phases: time every phase of every step, at the price of synchronising in between.
        acceptance_ratio: replace the drafts by known tokens that are right at this rate; needs `known_tokens`.
        known_tokens: what plain decoding emits for each sequence.
        capture: run each step as one CUDA graph where that is possible; off, steps are launched from Python.
        prepare_only: do what comes before the prompt (capturing, above all) and return without decoding.
    """

    drafts: str = "streams"
    draft_nodes: int | None = None
    plan: DraftPlan | None = None
    record_phases: bool = False
    acceptance_ratio: float | None = None
    known_tokens: list[list[int]] = field(default_factory=list)
    capture: bool = True
    prepare_only: bool = False

    def __post_init__(self) -> None:
        if self.drafts not in ("streams", "none"):
            raise ValueError(f"drafts must be 'streams' or 'none', got {self.drafts!r}.")
        if self.draft_nodes is not None and self.draft_nodes < 1:
            raise ValueError(f"draft_nodes counts the root and must be at least 1, got {self.draft_nodes}.")
        if self.acceptance_ratio is not None and not 0.0 <= self.acceptance_ratio <= 1.0:
            raise ValueError(f"acceptance_ratio must lie between 0 and 1, got {self.acceptance_ratio}.")


class DecodeRun(ABC):
    """The host's side of a call: its sequences, plan and statistics."""

    def __init__(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        options: DecodeOptions,
        plan: DraftPlan,
        rule: Rule,
        timer: PhaseTimer,
    ):
        self.model = model
        self.config = config
        self.rule = rule
        self.timer = timer
        self.sequences = Sequences(
            input_ids,
            attention_mask,
            stop_rule(config, criteria, input_ids.shape[1]),
            limit=model.config.max_position_embeddings,
        )
        self.options = options
        self.plan = plan
        self.statistics = GenerationStatistics(
            prompt_tokens=list(self.sequences.prompt_lengths), draft_nodes=self.plan.shape.nodes
        )

    @abstractmethod
    def prepare(self) -> None:
        """Does what must be done before the prompt and depends on it only by its length."""

    @abstractmethod
    def prefill(self) -> None:
        """Runs the prompts and gives each sequence its first token."""

    @abstractmethod
    def step(self) -> None:
        """Runs one decode step and reads its tokens."""

    def add_phases(self) -> dict[str, float] | None:
        """Adds what the timer has measured to the totals of the call and returns it."""
        phases = self.timer.take()
        if phases is not None:
            totals = self.statistics.phases_s = self.statistics.phases_s or {}
            for phase, seconds in phases.items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        return phases

    def stream(self, streamer: BaseStreamer | None) -> None:
        """Hands new tokens to the streamer."""
        fresh = self.sequences.take_new()
        if streamer is not None and fresh:
            streamer.put(torch.tensor(fresh))

    def result(self) -> torch.Tensor | SpecGenerateOutput:
        """Returns (batch, longest) int64 sequences as upstream would, or upstream's output class with statistics."""
        # Upstream annotates its output narrower than what it puts there.
        sequences: Any = self.sequences.padded(self.config, self.model.device)
        scores, logits = self.kept()
        self.statistics.finish_reasons = self.sequences.reasons()
        if not self.config.return_dict_in_generate:
            return sequences
        return SpecGenerateOutput(
            sequences=sequences, scores=scores, logits=logits, statistics=self.statistics
        )

    def kept(self) -> tuple[Any, Any]:
        """Returns scores and logits of the emitted tokens, `None` where they were not asked for."""
        return None, None


class EagerRun(DecodeRun):
    """A call whose steps are launched from Python; keeps scores and logits where asked for."""

    def __init__(self, model, input_ids: torch.Tensor, *args: Any):
        super().__init__(model, input_ids, *args)
        options = self.options
        self.source: DraftSource = StreamSource()
        if options.acceptance_ratio is not None:
            # Each prompt has draws of its own, the same in every run.
            seed = zlib.crc32(str(input_ids.tolist()).encode())
            generator = random.Random(seed)  # noqa: S311 - draws of an experiment, not a secret
            counts = self.sequences.counts
            self.source = OracleSource(
                self.source, options.known_tokens, options.acceptance_ratio, generator, counts
            )
        self.kept_scores: list[list[torch.Tensor]] = [[] for _ in input_ids]
        self.kept_logits: list[list[torch.Tensor]] = [[] for _ in input_ids]

    def prepare(self) -> None:
        """Lets a CPU's linear layers keep their weights packed."""
        pack_linears(self.model)
        repack_linears(self.model)

    def prefill(self) -> None:
        """Runs the prompts, picks each sequence's first token and leaves the streams' states for the first draft."""
        rule = self.rule
        prompts, lengths = self.sequences.prompts(self.model.device)
        longest, shortest = int(lengths.max()), int(lengths.min())
        streams = self.plan.shape.streams
        room = min(self.sequences.room(), self.model.config.max_position_embeddings - shortest)
        self.cache = StaticTreeCache.for_model(
            self.model,
            batch=len(prompts),
            capacity=longest + room,
            scratch=self.plan.shape.rows + self.plan.shape.depth + 1,
        )
        self.statistics.kv_bytes = self.cache.nbytes()
        last = (lengths - 1)[:, None]
        hidden, stream_hidden = self.model.stream_forward(prompts, last, self.cache, streams)
        hidden = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[2]))
        logits = self.model.get_output_embeddings()(hidden)
        histories = self.sequences.histories() if rule.needs_prefixes else []
        scores = rule.scores(logits, histories)
        chosen = rule.pick(scores)
        self._keep(chosen.new_zeros(len(prompts), 1).tolist(), [1] * len(prompts), scores, logits)
        tokens = chosen.tolist()
        _check_finite(logits)
        self.sequences.extend(tokens)
        self.state = DecodeState(
            root=chosen[:, 0],
            lengths=lengths,
            finished=self.sequences.finished_mask(self.model.device),
            stream_hidden=stream_hidden[:, 0] if stream_hidden is not None else None,
            histories=[],
            longest=longest,
            shortest=shortest,
        )
        self._after()

    def step(self) -> None:
        """Runs one decode step and reads its tokens."""
        started = time.perf_counter()
        state, rule, timer = self.state, self.rule, self.timer
        shape = self.plan.shape.cut(self.sequences.depth_left(state))
        keep = self.plan.keep if self.plan.keep is not None and self.plan.keep < shape.nodes else None
        out = decode_step(self.model, self.cache, state, shape, rule, self.source, timer, keep)
        packed = out.packed.tolist()  # the one host read of the step
        with timer.time("host"):
            counts = [row[0] for row in packed]
            self._keep(out.path.tolist() if self._wants_scores() else [], counts, out.scores, out.logits)
            emitted = self.sequences.extend([row[1 : 1 + row[0]] for row in packed])
            accepted = [count - 1 if gained else 0 for count, gained in zip(counts, emitted, strict=True)]
            self._after()
        self._record(out, emitted, accepted, time.perf_counter() - started)

    def _after(self) -> None:
        """Tells the state what the host learnt."""
        state = self.state
        lengths = self.sequences.committed()
        state.longest, state.shortest = max(lengths), min(lengths)
        if self.sequences.newly_finished():
            state.finished = self.sequences.finished_mask(self.model.device)
            # Stop rules may have cut a finished sequence below what the device committed.
            state.lengths = torch.tensor(lengths, device=self.model.device)
        if self.rule.needs_prefixes:
            state.histories = self.sequences.histories()

    def _record(self, out: StepOutput, emitted: list[int], accepted: list[int], seconds: float) -> None:
        phases = self.add_phases()
        drafted = out.tree.shape.nodes - 1
        self.statistics.steps.append(StepRecord(emitted, accepted, drafted, out.rows, seconds, phases))

    def _wants_scores(self) -> bool:
        return bool(self.config.output_scores or self.config.output_logits)

    def _keep(
        self, paths: list[list[int]], counts: list[int], scores: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Keeps scores and logits of the emitted tokens where the caller asked for them."""
        if not self._wants_scores():
            return
        for row, (path, count) in enumerate(zip(paths, counts, strict=True)):
            self.kept_scores[row].extend(scores[row, path[:count]].float().unbind(0))
            self.kept_logits[row].extend(logits[row, path[:count]].unbind(0))

    def kept(self) -> tuple[Any, Any]:
        scores = _by_token(self.kept_scores, self.sequences) if self.config.output_scores else None
        logits = _by_token(self.kept_logits, self.sequences) if self.config.output_logits else None
        return scores, logits


class CapturedRun(DecodeRun):
    """A call whose steps are replays of captured graphs."""

    runner: GraphRunner

    def prepare(self) -> None:
        """Finds the graphs of this geometry, or captures them."""
        longest, room = max(self.sequences.prompt_lengths), self.sequences.room()
        geometry = geometry_of(
            self.model,
            len(self.sequences.counts),
            longest,
            room,
            self.plan,
            self.rule,
            self.options.record_phases,
        )
        self.runner = runner_for(self.model, geometry, self.rule)
        self.statistics.runner = "cuda graph"
        self.statistics.capture_s = self.runner.capture_s
        self.statistics.capture_bytes = self.runner.capture_bytes
        self.statistics.kv_bytes = self.runner.step_buffers.cache.nbytes()

    def prefill(self) -> None:
        # They enter the graph from the host's memory, and the host has read them: no way there and back.
        tokens, finite = self.runner.prefill(*self.sequences.prompts("cpu"))
        if not finite:
            raise ValueError(_not_finite(self.model.dtype))
        self.sequences.extend([[token] for token in tokens])
        self._after()

    def step(self) -> None:
        started = time.perf_counter()
        emitted = self.runner.step(self.sequences.wanted(), self.timer, self.sequences.go_on)
        with self.timer.time("host"):
            gained = self.sequences.extend(emitted)
            self._after()
        accepted = [len(tokens) - 1 if count else 0 for tokens, count in zip(emitted, gained, strict=True)]
        nodes = self.plan.shape.nodes
        seconds = time.perf_counter() - started
        self.statistics.steps.append(
            StepRecord(gained, accepted, nodes - 1, self.plan.rows, seconds, self.add_phases())
        )

    def _after(self) -> None:
        if self.sequences.newly_finished():
            self.runner.finish(self.sequences.ended())


def start_run(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    config: GenerationConfig,
    criteria: StoppingCriteriaList,
    options: DecodeOptions,
    rule: Rule,
) -> DecodeRun:
    """Returns the run of a call: captured where the device and the call allow it, else eager with the reason recorded.

    Args:
        model: decoder with streams.
        input_ids: (batch, seq) int64.
        attention_mask: (batch, seq) or `None`.
        config: of the call.
        criteria: upstream's stopping criteria.
        options: ours.
        rule: how the target picks tokens.
    """
    plan = DraftPlan.plain()
    if options.drafts == "streams" and model.streams is not None:
        plan = options.plan or plan_for(model, options.draft_nodes, len(input_ids))
    timer = PhaseTimer(model.device, options.record_phases)
    reason = _eager_reason(model, config, options, plan, rule)
    kind = CapturedRun if reason is None else EagerRun
    run = kind(model, input_ids, attention_mask, config, criteria, options, plan, rule, timer)
    if reason is not None and model.device.type != "cpu" and options.capture:
        run.statistics.fallbacks.append(f"steps are launched one by one: {reason}")
    slower = gluon_unavailable() if reason is None else None
    packed = getattr(model.config, "quantization_config", None) is not None
    if slower is not None and (packed or len(input_ids) * plan.shape.nodes > 1):
        run.statistics.fallbacks.append(f"products of a few rows, or of packed weights, are slower: {slower}")
    return run


def _eager_reason(
    model, config: GenerationConfig, options: DecodeOptions, plan: DraftPlan, rule: Rule
) -> str | None:
    if not options.capture:
        return "not asked for"
    if config.output_scores or config.output_logits:
        return "scores and logits are wanted"
    if options.acceptance_ratio is not None:
        return "an acceptance sweep replaces drafts on the host"
    return uncaptured_reason(model, plan, rule)


def _by_token(kept: list[list[torch.Tensor]], sequences: Sequences) -> tuple[torch.Tensor, ...]:
    """Returns one (batch, vocab) tensor an emitted token; zeros where a sequence had ended."""
    longest = max(sequences.counts)
    rows = [row[:count] for row, count in zip(kept, sequences.counts, strict=True)]
    blank = torch.zeros_like(next(value for row in rows for value in row))
    return tuple(torch.stack([row[i] if i < len(row) else blank for row in rows]) for i in range(longest))


def _check_finite(logits: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(_not_finite(logits.dtype))


def _not_finite(dtype: torch.dtype) -> str:
    return f"the model's logits are not finite in {dtype}; load it in bfloat16 or float32 instead."
