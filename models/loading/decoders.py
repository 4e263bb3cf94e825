"""One call of `generate`, stock or ours.

Both are timed by the same rule: the clock starts with the prompts on an idle device and stops when the last token is there. What
differs between the two decoders ends in this file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from huggingface.transformers.generation.tree_tuning import CONFIG_KEY, batch_class, tune, tuned_nodes
from models.answer import Limits
from models.technique import Recipe


@dataclass(frozen=True)
class Prompts:
    """Prompts of one call, padded on the left.

    Attributes:
        ids: (batch, seq) int64.
        mask: (batch, seq) int64, 0 where a row is padded.
        new_tokens: most tokens each row may gain.
        known: what plain decoding emits for each row, where drafts are to be right at a given rate.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    new_tokens: int
    known: list[list[int]] | None = None


@dataclass
class Call:
    """What one call did.

    Attributes:
        rows: new ids of each row; padding after the end-of-text token may follow.
        ttft_s: seconds to the first token.
        total_s: seconds to the last.
        steps: decode steps of each row.
        kv_bytes: bytes of the cache at the end.
        first: tokens each row gained in the first pass; upstream's prompt lookup drafts in it already.
        phases_s: seconds by phase, where asked for.
        draft_nodes: nodes of the draft tree, root included; `None` where our engine drafts nothing.
        draft_source: who decided that number: `given`, `tuned`, `tuned at load` or `default`.
    """

    rows: list[list[int]]
    ttft_s: float
    total_s: float
    steps: list[list[dict[str, Any]]]
    kv_bytes: int
    first: int = 1
    phases_s: dict[str, float] | None = None
    draft_nodes: int | None = None
    draft_source: str | None = None


class Decoder(Protocol):
    """Runs one call."""

    def prepare(self, batch: int) -> None:
        """Does what must be done before the first call with so many prompts, and is no part of it."""

    def run(
        self, prompts: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        """Returns what the call did."""


def generation_config(
    prompts: Prompts, limits: Limits, end_ids: list[int], pad_id: int, **options: Any
) -> GenerationConfig:
    """Returns upstream's configuration of one call: our limits and nothing that a checkpoint may have brought.

    Args:
        prompts: the call's prompts.
        limits: how long and by which rule.
        end_ids: ids that end a text.
        pad_id: fills rows that end early.
        **options: further fields, the recipe's own.
    """
    # top_k 0 and top_p 1 are "off"; left out, upstream would sample from the 50 likeliest tokens.
    sampling = (
        {"temperature": limits.temperature, "top_k": limits.top_k, "top_p": limits.top_p}
        if limits.samples
        else {}
    )
    return GenerationConfig(
        max_new_tokens=prompts.new_tokens,
        do_sample=limits.samples,
        eos_token_id=None if limits.ignore_eos or not end_ids else end_ids,
        pad_token_id=pad_id,
        **sampling,
        **options,
    )


class StockDecoder:
    """Upstream's `generate`.

    Args:
        model: a stock model; its generation configuration is replaced by an empty one.
        recipe: resolved, with the decoder `stock`.
        end_ids: ids that end a text.
        pad_id: fills rows that end early.
    """

    def __init__(self, model: Any, recipe: Recipe, end_ids: list[int], pad_id: int):
        model.generation_config = GenerationConfig()
        self.model = model
        self.recipe = recipe
        self.end_ids = end_ids
        self.pad_id = pad_id

    def prepare(self, batch: int) -> None:
        """Upstream's loop needs nothing."""

    def run(
        self, prompts: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        """Returns what the call did; `prefill` is the time to the first token, `forward` that inside later passes."""
        if acceptance_ratio is not None:
            raise ValueError("an acceptance sweep needs our own draft tree; ask for it with spec_stream.")
        if self.recipe.drafts and len(prompts.ids) > 1:
            raise ValueError("upstream's speculation runs at batch size 1 alone; use --batch_size 1.")
        watched = record_phases or self.recipe.drafts is not None
        with watched_passes(self.model, timed=record_phases) if watched else nullcontext() as passes:
            first = FirstToken(self.model.device, passes)
            synchronise(self.model.device)
            started = first.started = time.perf_counter()
            output = self._decode(prompts, limits, first)
            synchronise(self.model.device)
            total_s = time.perf_counter() - started
        rows = output.sequences[:, prompts.ids.shape[1] :].tolist()
        return Call(
            rows=rows,
            ttft_s=first.seconds,
            total_s=total_s,
            steps=[_stock_steps(first.lengths, passes if self.recipe.drafts else None) for _ in rows],
            kv_bytes=_cache_bytes(output.past_key_values),
            first=first.lengths[0] - prompts.ids.shape[1],
            phases_s=_stock_phases(first.seconds, total_s, passes) if record_phases and passes else None,
        )

    def _decode(self, prompts: Prompts, limits: Limits, first: FirstToken) -> Any:
        """Returns upstream's output.

        Upstream looks drafts up without regard to the last position, where a model with learned positions fails. So drafts stop
        before any could reach it, and plain decoding goes on from the same cache.
        """
        options = dict(self.recipe.generate_options)
        length = prompts.ids.shape[1]
        reach = options.get("prompt_lookup_num_tokens", 0)
        safe = self.model.config.max_position_embeddings - length - reach + 1 if reach else prompts.new_tokens
        if safe >= prompts.new_tokens:
            return self._generate(prompts, limits, first, options)
        if safe < 1:
            return self._generate(prompts, limits, first, {})
        output = self._generate(replace(prompts, new_tokens=safe), limits, first, options)
        left = prompts.new_tokens - (output.sequences.shape[1] - length)
        ended = not limits.ignore_eos and any(
            token in self.end_ids for token in output.sequences[0, length:].tolist()
        )
        if left < 1 or ended:
            return output
        rest = Prompts(output.sequences, torch.ones_like(output.sequences), left)
        return self._generate(rest, limits, first, {}, past_key_values=output.past_key_values)

    def _generate(
        self, prompts: Prompts, limits: Limits, first: FirstToken, options: dict[str, Any], **inputs: Any
    ) -> Any:
        config = generation_config(
            prompts,
            limits,
            self.end_ids,
            self.pad_id,
            use_cache=self.recipe.kv != "none",
            return_dict_in_generate=True,
            **options,
        )
        return self.model.generate(
            prompts.ids,
            attention_mask=prompts.mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([first]),
            **inputs,
        )


class EngineDecoder:
    """Our `generate`, with streams drafting or with nobody.

    Args:
        model: a model with our decode loop; its generation configuration keeps the tuned trees alone.
        recipe: resolved, with the decoder `engine`.
        end_ids: ids that end a text.
        pad_id: fills rows that end early.
        draft_nodes: nodes of the draft tree where the recipe leaves them open.
        tunes: measure which tree suits this device where the checkpoint does not know it.
    """

    def __init__(
        self,
        model: Any,
        recipe: Recipe,
        end_ids: list[int],
        pad_id: int,
        draft_nodes: int | str = "auto",
        tunes: bool = True,
    ):
        tuned = getattr(model.generation_config, CONFIG_KEY, None)
        model.generation_config = GenerationConfig(**({CONFIG_KEY: tuned} if tuned else {}))
        chosen = recipe.generate_options.get("draft_nodes", "auto")
        chosen = draft_nodes if chosen == "auto" else chosen
        self.model = model
        self.end_ids = end_ids
        self.pad_id = pad_id
        self.drafts = recipe.drafts or "none"
        self.draft_nodes = None if chosen == "auto" else int(chosen)
        self._tunes = tunes
        self._sources: dict[int, str] = {}

    def prepare(self, batch: int) -> None:
        """Decides the draft tree of this batch size; measures steps, for a few seconds, where nobody has before.

        Not while the model loads: workers load side by side and would disturb each other's measurements.
        """
        size = batch_class(batch)
        if self.drafts == "none" or size in self._sources:
            return
        if self.draft_nodes is not None:
            self._sources[size] = "given"
        elif tuned_nodes(self.model, batch):
            self._sources[size] = "tuned"
        elif self._tunes:
            tune(self.model, batch=batch)
            self._sources[size] = "tuned at load"
        else:
            self._sources[size] = "default"

    def run(
        self, prompts: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        """Returns what the call did."""
        if acceptance_ratio is not None and self.drafts == "none":
            raise ValueError("an acceptance sweep needs a technique that drafts, such as spec_stream.")
        config = generation_config(prompts, limits, self.end_ids, self.pad_id, return_dict_in_generate=True)
        synchronise(self.model.device)
        started = time.perf_counter()
        output = self.model.generate(
            prompts.ids,
            attention_mask=prompts.mask,
            generation_config=config,
            drafts=self.drafts,
            draft_nodes=self.draft_nodes,
            record_phases=record_phases,
            acceptance_ratio=acceptance_ratio,
            known_tokens=prompts.known,
        )
        synchronise(self.model.device)
        total_s = time.perf_counter() - started
        told = output.statistics
        return Call(
            rows=output.sequences[:, prompts.ids.shape[1] :].tolist(),
            ttft_s=told.ttft_s,
            total_s=total_s,
            steps=[_engine_steps(told.steps, row) for row in range(len(prompts.ids))],
            kv_bytes=told.kv_bytes,
            phases_s=told.phases_s,
            draft_nodes=told.draft_nodes if self.drafts != "none" else None,
            draft_source=self._sources.get(batch_class(len(prompts.ids))),
        )

    def plain(self, prompts: Prompts, limits: Limits) -> list[list[int]]:
        """Returns what each row emits with nothing drafted."""
        config = generation_config(prompts, limits, self.end_ids, self.pad_id)
        output = self.model.generate(
            prompts.ids, attention_mask=prompts.mask, generation_config=config, drafts="none"
        )
        return output[:, prompts.ids.shape[1] :].tolist()


def synchronise(device: torch.device) -> None:
    """Waits until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Passes:
    """Forward passes of one call: rows of each, and its seconds where they were timed."""

    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class FirstToken(StoppingCriteria):
    """Never stops; notes when the first token came and how long the sequence was after each pass.

    A streamer would move every token to the host and so change what is measured.

    Args:
        device: synchronised at the first token.
        passes: the call's passes where they are watched. Upstream's speculation (5.17) also asks about drafts that no pass
            has seen yet; such a question is told by no pass having come before it.
    """

    def __init__(self, device: torch.device, passes: Passes | None = None):
        self.device = device
        self.passes = passes
        self.started = 0.0
        self.seconds = 0.0
        self.lengths: list[int] = []
        self._never: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Returns (batch,) False."""
        del scores, kwargs
        if self._never is None:
            self._never = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.passes is not None and len(self.passes.rows) == len(self.lengths):
            return self._never
        if not self.lengths:
            synchronise(self.device)
            self.seconds = time.perf_counter() - self.started
        self.lengths.append(input_ids.shape[1])
        return self._never


@contextmanager
def watched_passes(model: Any, timed: bool) -> Iterator[Passes]:
    """Notes the rows of every forward pass inside; `timed` also synchronises around each, which slows the call."""
    passes = Passes()
    starts: list[float] = []

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        passes.rows.append(ids.shape[1])
        if timed:
            synchronise(model.device)
            starts.append(time.perf_counter())

    def after(_module: Any, _args: tuple[Any, ...], _output: Any) -> None:
        if timed:
            synchronise(model.device)
            passes.seconds.append(time.perf_counter() - starts[-1])

    hooks = [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _stock_steps(lengths: list[int], passes: Passes | None) -> list[dict[str, Any]]:
    """Returns the decode steps of a stock call from the sequence's length after each pass.

    Where passes are given, nodes were drafted: a pass after the first has the last token and the drafts as its rows.
    """
    drafted = [rows - 1 for rows in passes.rows[1:]] if passes else [0] * (len(lengths) - 1)
    return [
        {"emitted": longer - shorter, "accepted": longer - shorter - 1, "nodes": nodes}
        for shorter, longer, nodes in zip(lengths, lengths[1:], drafted, strict=False)
    ]


def _stock_phases(ttft_s: float, total_s: float, passes: Passes) -> dict[str, float]:
    forward = sum(passes.seconds[1:])
    return {"prefill": ttft_s, "forward": forward, "host": max(total_s - ttft_s - forward, 0.0)}


def _engine_steps(records: list[Any], row: int) -> list[dict[str, Any]]:
    return [
        {
            "emitted": record.emitted[row],
            "accepted": record.accepted[row],
            "nodes": record.drafted,
            "rows": record.rows,
            "seconds": record.seconds,
        }
        for record in records
        if record.emitted[row]
    ]


def _cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in getattr(cache, "layers", ()) for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
