"""`generate` with draft trees: upstream prepares, our loop decodes.

Replaces the decoding method of `transformers.generation.utils.GenerationMixin`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/generation/utils.py, through its
`custom_generate` argument. Configuration, logits processors and stopping criteria are upstream's. Differences: a step may emit
several tokens; each sequence of a batch keeps its own length, and left padding is stripped before prefill.
"""

from __future__ import annotations

import random
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer

from ..cache_utils import StaticTreeCache
from ..integrations.packed_linear import pack_linears
from .decode_step import DecodeState, StepOutput, decode_step
from .draft_sources import DraftSource, OracleSource, StreamSource
from .sequences import Sequences, stop_rule
from .step_record import GenerationStatistics, PhaseTimer, SpecGenerateOutput, StepRecord
from .tree_tuning import DraftPlan, plan_for
from .verification import Rule

__all__ = ["DecodeOptions", "SpecGenerationMixin"]


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
    """

    drafts: str = "streams"
    draft_nodes: int | None = None
    plan: DraftPlan | None = None
    record_phases: bool = False
    acceptance_ratio: float | None = None
    known_tokens: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.drafts not in ("streams", "none"):
            raise ValueError(f"drafts must be 'streams' or 'none', got {self.drafts!r}.")
        if self.draft_nodes is not None and self.draft_nodes < 1:
            raise ValueError(f"draft_nodes counts the root and must be at least 1, got {self.draft_nodes}.")
        if self.acceptance_ratio is not None and not 0.0 <= self.acceptance_ratio <= 1.0:
            raise ValueError(f"acceptance_ratio must lie between 0 and 1, got {self.acceptance_ratio}.")


class SpecGenerationMixin:
    """Adds draft trees to a stock model's `generate`."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        drafts: str = "streams",
        draft_nodes: int | None = None,
        plan: DraftPlan | None = None,
        record_phases: bool = False,
        acceptance_ratio: float | None = None,
        known_tokens: list[list[int]] | None = None,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | SpecGenerateOutput:
        """Returns what upstream's `generate` returns, sooner; with `return_dict_in_generate=True`, statistics as well.

        Args:
            inputs: (batch, seq) int64 prompts, or `input_ids=`; padding (either side) told by `attention_mask`.
            drafts, draft_nodes, plan, record_phases, acceptance_ratio, known_tokens: see :class:`DecodeOptions`.
            streamer: takes the tokens, several at a time; batch size 1.
            tokenizer, stop_strings: end a sequence after any of these strings.
            stopping_criteria: asked after every token, for one sequence at a time.
            **kwargs: upstream's own, such as `max_new_tokens`, `do_sample`, `generation_config`.

        Raises:
            ValueError: an option is out of range, or asks for beams, which have no draft tree.
        """
        started = time.perf_counter()
        options = DecodeOptions(
            drafts, draft_nodes, plan, record_phases, acceptance_ratio, known_tokens or []
        )
        criteria = StoppingCriteriaList(stopping_criteria or [])
        if stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... to generate.")
            criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
        loop = partial(_decode, options=options, output_streamer=streamer, started=started)
        return super().generate(
            inputs, streamer=streamer, stopping_criteria=criteria, custom_generate=loop, **kwargs
        )


def _decode(
    model,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    options: DecodeOptions,
    output_streamer: BaseStreamer | None,
    started: float,
    **model_kwargs: Any,
) -> torch.Tensor | SpecGenerateOutput:
    """Decodes the prepared inputs; the loop of the paper: prefill, then draft, verify, accept, commit until all have finished."""
    # Not a named argument: upstream would then also pass the caller's own mask, and the call would fail.
    attention_mask = model_kwargs.get("attention_mask")
    _check_supported(generation_config, output_streamer, input_ids)
    pack_linears(model)
    run = _Run(model, input_ids, attention_mask, generation_config, stopping_criteria, options)
    rule = Rule(logits_processor, bool(generation_config.do_sample))
    timer = PhaseTimer(model.device, options.record_phases)
    if run.sequences.room() > 0:
        with timer.time("prefill"):
            state = run.prefill(rule)
        run.statistics.ttft_s = time.perf_counter() - started
        run.add_phases(timer)
        run.stream(output_streamer)
        while run.sequences.running():
            run.step(state, rule, timer)
            run.stream(output_streamer)
    if output_streamer is not None:
        output_streamer.end()
    run.statistics.total_s = time.perf_counter() - started
    return run.result()


def _check_supported(
    config: GenerationConfig, streamer: BaseStreamer | None, input_ids: torch.Tensor
) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams {config.num_beams}: beams have no draft tree; set num_beams=1.")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer takes one sequence, got {len(input_ids)}; stream prompts one by one.")


class _Run:
    """One call of `generate`: its sequences, cache, plan and statistics."""

    def __init__(
        self,
        model,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        config: GenerationConfig,
        criteria: StoppingCriteriaList,
        options: DecodeOptions,
    ):
        self.model = model
        self.config = config
        others = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        self.sequences = Sequences(
            input_ids,
            attention_mask,
            stop_rule(config, others, config.max_length - input_ids.shape[1]),
            limit=model.config.max_position_embeddings,
        )
        self.options = options
        streams = options.drafts == "streams" and model.streams is not None
        self.plan = DraftPlan.plain()
        if streams:
            self.plan = options.plan or plan_for(model, options.draft_nodes, len(input_ids))
        self.source: DraftSource = StreamSource()
        if options.acceptance_ratio is not None:
            # Each prompt has draws of its own, the same in every run.
            seed = zlib.crc32(str(input_ids.tolist()).encode())
            generator = random.Random(seed)  # noqa: S311 - draws of an experiment, not a secret
            counts = self.sequences.counts
            self.source = OracleSource(
                self.source, options.known_tokens, options.acceptance_ratio, generator, counts
            )
        self.statistics = GenerationStatistics(
            prompt_tokens=list(self.sequences.prompt_lengths), draft_nodes=self.plan.shape.nodes
        )
        self.kept_scores: list[list[torch.Tensor]] = [[] for _ in input_ids]
        self.kept_logits: list[list[torch.Tensor]] = [[] for _ in input_ids]

    def prefill(self, rule: Rule) -> DecodeState:
        """Runs the prompts, picks each sequence's first token and leaves the streams' states for the first draft."""
        prompts, lengths = self.sequences.prompts()
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
        state = DecodeState(
            root=chosen[:, 0],
            lengths=lengths,
            finished=self.sequences.finished_mask(self.model.device),
            stream_hidden=stream_hidden[:, 0] if stream_hidden is not None else None,
            histories=[],
            longest=longest,
            shortest=shortest,
        )
        self._after(state, rule)
        return state

    def step(self, state: DecodeState, rule: Rule, timer: PhaseTimer) -> None:
        """Runs one decode step and reads its tokens."""
        started = time.perf_counter()
        shape = self.plan.shape.cut(self.sequences.depth_left(state))
        keep = self.plan.keep if self.plan.keep is not None and self.plan.keep < shape.nodes else None
        out = decode_step(self.model, self.cache, state, shape, rule, self.source, timer, keep)
        packed = out.packed.tolist()  # the one host read of the step
        with timer.time("host"):
            counts = [row[0] for row in packed]
            self._keep(out.path.tolist() if self._wants_scores() else [], counts, out.scores, out.logits)
            emitted = self.sequences.extend([row[1 : 1 + row[0]] for row in packed])
            accepted = [count - 1 if gained else 0 for count, gained in zip(counts, emitted, strict=True)]
            self._after(state, rule)
        self._record(out, emitted, accepted, time.perf_counter() - started, timer)

    def _after(self, state: DecodeState, rule: Rule) -> None:
        """Tells the state what the host learnt."""
        lengths = self.sequences.committed()
        state.longest, state.shortest = max(lengths), min(lengths)
        if self.sequences.newly_finished():
            state.finished = self.sequences.finished_mask(self.model.device)
            # Stop rules may have cut a finished sequence below what the device committed.
            state.lengths = torch.tensor(lengths, device=self.model.device)
        if rule.needs_prefixes:
            state.histories = self.sequences.histories()

    def _record(
        self, out: StepOutput, emitted: list[int], accepted: list[int], seconds: float, timer: PhaseTimer
    ) -> None:
        phases = self.add_phases(timer)
        drafted = out.tree.shape.nodes - 1
        self.statistics.steps.append(StepRecord(emitted, accepted, drafted, out.rows, seconds, phases))

    def add_phases(self, timer: PhaseTimer) -> dict[str, float] | None:
        """Adds what the timer took to the totals of the call and returns it."""
        phases = timer.take()
        if phases is not None:
            totals = self.statistics.phases_s = self.statistics.phases_s or {}
            for phase, seconds in phases.items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        return phases

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

    def stream(self, streamer: BaseStreamer | None) -> None:
        """Hands new tokens to the streamer."""
        fresh = self.sequences.take_new()
        if streamer is not None and fresh:
            streamer.put(torch.tensor(fresh))

    def result(self) -> torch.Tensor | SpecGenerateOutput:
        """Returns (batch, longest) int64 sequences as upstream would, or upstream's output class with statistics."""
        # Upstream annotates its output narrower than what it puts there.
        sequences: Any = self.sequences.padded(self.config, self.model.device)
        scores: Any = _by_token(self.kept_scores, self.sequences) if self.config.output_scores else None
        logits: Any = _by_token(self.kept_logits, self.sequences) if self.config.output_logits else None
        self.statistics.finish_reasons = self.sequences.reasons()
        if not self.config.return_dict_in_generate:
            return sequences
        return SpecGenerateOutput(
            sequences=sequences, scores=scores, logits=logits, statistics=self.statistics
        )


def _by_token(kept: list[list[torch.Tensor]], sequences: Sequences) -> tuple[torch.Tensor, ...]:
    """Returns one (batch, vocab) tensor an emitted token; zeros where a sequence had ended."""
    longest = max(sequences.counts)
    rows = [row[:count] for row, count in zip(kept, sequences.counts, strict=True)]
    blank = torch.zeros_like(next(value for row in rows for value in row))
    return tuple(torch.stack([row[i] if i < len(row) else blank for row in rows]) for i in range(longest))


def _check_finite(logits: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"the model's logits are not finite in {logits.dtype}; load it in bfloat16 or float32 instead."
        )
