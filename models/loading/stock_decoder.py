"""Upstream's `generate`, plain or with upstream's own speculation.

Upstream drafts in the first pass already, and without regard to the last position; the first is only counted here, the second
is kept from happening.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from models.answer import Limits
from models.loading.calls import Call, Prompts, generation_config, synchronise
from models.loading.passes import FirstToken, Passes, watched_passes
from models.technique import Recipe


class StockDecoder:
    """Upstream's `generate`.

    Args:
        model: a stock model; its generation configuration is replaced by an empty one.
        recipe: resolved, with the decoder `stock`.
        end_ids: ids that end a text.
        pad_id: fills rows that end early.
        assistant: a small stock model where the recipe's drafts are an assistant's; its generation configuration, where upstream
            looks for the options of drafting, is replaced by the recipe's.
    """

    def __init__(
        self, model: Any, recipe: Recipe, end_ids: list[int], pad_id: int, assistant: Any | None = None
    ):
        model.generation_config = GenerationConfig()
        if assistant is not None:
            assistant.generation_config = GenerationConfig(**recipe.generate_options)
        self.model = model
        self.recipe = recipe
        self.end_ids = end_ids
        self.pad_id = pad_id
        self.assistant = assistant

    def prepare(self, prompts: Prompts) -> None:
        """Upstream's loop needs nothing."""

    def run(
        self, prompts: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        """Returns what the call did.

        Of its phases `prefill` is the time to the first token; `forward` and `draft` are the model's and the assistant's passes
        after it.
        """
        if acceptance_ratio is not None:
            raise ValueError("an acceptance sweep needs our own draft tree; ask for it with spec_stream.")
        drafts = self.recipe.drafts is not None
        if drafts and len(prompts.ids) > 1:
            raise ValueError("upstream's speculation runs at batch size 1 alone; use --batch_size 1.")
        with ExitStack() as stack:
            passes, drafting = (
                stack.enter_context(watched_passes(model, timed=record_phases)) if watched else None
                for model, watched in (
                    (self.model, record_phases or drafts),
                    (self.assistant, self.assistant is not None),
                )
            )
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
            steps=[_steps(first.lengths, passes if drafts else None) for _ in rows],
            kv_bytes=_cache_bytes(output.past_key_values) + (_cache_bytes(drafting.cache) if drafting else 0),
            first=first.lengths[0] - prompts.ids.shape[1],
            phases_s=_phases(first, total_s, passes, drafting) if record_phases and passes else None,
        )

    def _decode(self, prompts: Prompts, limits: Limits, first: FirstToken) -> Any:
        """Returns upstream's output: drafted as far as positions reach, then decoded plainly from the same cache."""
        length = prompts.ids.shape[1]
        safe = self._tokens_while_drafting(length) if self.recipe.drafts else prompts.new_tokens
        if safe >= prompts.new_tokens:
            return self._generate(prompts, limits, first, drafts=True)
        if safe < 1:
            return self._generate(prompts, limits, first, drafts=False)
        output = self._generate(replace(prompts, new_tokens=safe), limits, first, drafts=True)
        left = prompts.new_tokens - (output.sequences.shape[1] - length)
        ended = not limits.ignore_eos and any(
            token in self.end_ids for token in output.sequences[0, length:].tolist()
        )
        if left < 1 or ended:
            return output
        rest = Prompts(output.sequences, torch.ones_like(output.sequences), left)
        return self._generate(rest, limits, first, drafts=False, past_key_values=output.past_key_values)

    def _tokens_while_drafting(self, length: int) -> int:
        """Returns how many tokens may be asked for after a prompt before drafts need a position that there is not.

        Looked-up drafts may reach `prompt_lookup_num_tokens` past the tokens asked for. An assistant's end before the last of
        these, so they keep within the model's positions, and it never reads the last token it drafts: the assistant's own
        positions may be two fewer than the text's.
        """
        if self.assistant is not None:
            return int(self.assistant.config.max_position_embeddings) - length + 2
        reach = self.recipe.generate_options["prompt_lookup_num_tokens"]
        return int(self.model.config.max_position_embeddings) - length - int(reach) + 1

    def _generate(
        self, prompts: Prompts, limits: Limits, first: FirstToken, *, drafts: bool, **inputs: Any
    ) -> Any:
        options: dict[str, Any] = {}
        if self.assistant is None:
            options = dict(self.recipe.generate_options) if drafts else {}
        elif drafts:
            inputs["assistant_model"] = self.assistant
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


def _steps(lengths: list[int], passes: Passes | None) -> list[dict[str, Any]]:
    """Returns the decode steps of a stock call from the sequence's length after each pass.

    Where passes are given, nodes were drafted: a pass after the first has the last token and the drafts as its rows.
    """
    drafted = [rows - 1 for rows in passes.rows[1:]] if passes else [0] * (len(lengths) - 1)
    return [
        {"emitted": longer - shorter, "accepted": longer - shorter - 1, "nodes": nodes}
        for shorter, longer, nodes in zip(lengths, lengths[1:], drafted, strict=False)
    ]


def _phases(first: FirstToken, total_s: float, passes: Passes, drafting: Passes | None) -> dict[str, float]:
    begun = first.started + first.seconds
    phases = {"prefill": first.seconds}
    if drafting is not None:
        phases["draft"] = drafting.seconds_since(begun)
    phases["forward"] = passes.seconds_since(begun)
    return phases | {"host": max(total_s - sum(phases.values()), 0.0)}


def _cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in getattr(cache, "layers", ()) for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
