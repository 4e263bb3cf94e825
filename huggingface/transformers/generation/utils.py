"""`generate` with draft trees: upstream prepares, our loop decodes.

Replaces the decoding method of `transformers.generation.utils.GenerationMixin`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/generation/utils.py, through its
`custom_generate` argument. Configuration, logits processors and stopping criteria are upstream's. Differences: a step may emit
several tokens; each sequence of a batch keeps its own length, and left padding is stripped before prefill. Of the preparation,
small methods are replaced that would make a first token wait for what our loop does not need; each says why.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .configuration_utils import prepare_generation_config, prepare_special_tokens
from .decode_run import DecodeOptions, start_run
from .model_context import model_context
from .processors import check_processors
from .step_record import SpecGenerateOutput
from .tree_tuning import DraftPlan
from .verification import Rule

__all__ = ["DecodeOptions", "SpecGenerationMixin"]


UNREAD_INPUTS = ("position_ids", "token_type_ids", "inputs_embeds")
"""Inputs that upstream's models take and that would change the text, were our loop to pass over them."""
UNSUPPORTED = ("dola_layers", "penalty_alpha", "output_attentions", "output_hidden_states")
"""Settings of upstream's decoding methods that ours has nothing for."""


class _Criteria(StoppingCriteriaList):
    """The caller's stopping criteria, with the tokenizer that upstream makes one for stop strings from."""

    tokenizer: Any = None


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
        capture: bool = True,
        prepare_only: bool = False,
        streamer: BaseStreamer | None = None,
        tokenizer: Any = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | SpecGenerateOutput:
        """Returns what upstream's `generate` returns, sooner; with `return_dict_in_generate=True`, statistics as well.

        A model decodes one call at a time: captured steps and packed weights belong to it, not to the call.

        Args:
            inputs: (batch, seq) int64 prompts, or `input_ids=`; padding (either side) told by `attention_mask`.
            drafts, draft_nodes, plan, record_phases, acceptance_ratio, known_tokens, capture, prepare_only: see
                :class:`DecodeOptions`.
            streamer: takes the tokens, several at a time; batch size 1.
            tokenizer, stop_strings: end a sequence after any of these strings.
            stopping_criteria: asked after every token, for one sequence at a time.
            **kwargs: upstream's own, such as `max_new_tokens`, `do_sample`, `generation_config`.

        Raises:
            ValueError: an option is out of range, or asks for beams, which have no draft tree.
        """
        started = time.perf_counter()
        options = DecodeOptions(
            drafts,
            draft_nodes,
            plan,
            record_phases,
            acceptance_ratio,
            known_tokens or [],
            capture,
            prepare_only,
        )
        if "custom_generate" in kwargs:
            raise ValueError("custom_generate: this model has a decoding loop of its own; leave it out.")
        if stop_strings is not None:
            if tokenizer is None:
                raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... to generate.")
            kwargs["stop_strings"] = stop_strings
        criteria = _Criteria(stopping_criteria or [])
        criteria.tokenizer = tokenizer
        loop = _Loop(options, streamer, started)
        return super().generate(
            inputs, streamer=streamer, stopping_criteria=criteria, custom_generate=loop, **kwargs
        )

    def _get_stopping_criteria(self, generation_config, stopping_criteria, tokenizer=None, **kwargs):
        """Upstream loses the tokenizer on the way to a decoding method of one's own; the criteria brought it along."""
        tokenizer = getattr(stopping_criteria, "tokenizer", tokenizer)
        return super()._get_stopping_criteria(
            generation_config, stopping_criteria=stopping_criteria, tokenizer=tokenizer, **kwargs
        )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        return prepare_generation_config(self, generation_config, **kwargs)

    def _prepare_special_tokens(
        self,
        generation_config: GenerationConfig,
        kwargs_has_attention_mask: bool | None = None,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        upstream = partial(
            super()._prepare_special_tokens, generation_config, kwargs_has_attention_mask, device, batch_size
        )
        warns = kwargs_has_attention_mask is False and batch_size != 1
        prepare_special_tokens(self, generation_config, upstream, device, warns)

    # What upstream's preparation asks of every model. Each answer is upstream's own for the models at hand, or nothing where our
    # loop never reads it; found upstream's way they took over a third of the time to a small model's first token.
    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Raises ValueError for arguments that model or loop do not take; a mask alone needs no look at signatures."""
        if model_kwargs.keys() - {"attention_mask"}:
            unread = [name for name in UNREAD_INPUTS if model_kwargs.get(name) is not None]
            if unread:
                raise ValueError(
                    f"{', '.join(unread)}: this decoding loop reads input_ids and attention_mask alone; leave it out."
                )
            super()._validate_model_kwargs(model_kwargs)

    def _supports_logits_to_keep(self) -> bool:
        """Every architecture's `forward` takes `logits_to_keep`."""
        return True

    def _supports_mm_encoder_outputs(self) -> bool:
        """None of them takes anything but text."""
        return False

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        """Our loop counts positions itself."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Our loop has a cache of its own; upstream's is left to check what was asked for."""
        asked = generation_config.cache_implementation is not None or generation_config.is_assistant
        if asked or model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)


@dataclass(frozen=True)
class _Loop:
    """Our decoding method as upstream calls it, with what upstream knows nothing of.

    Attributes:
        options: ours.
        streamer: takes the tokens.
        started: when the call began.
    """

    options: DecodeOptions
    streamer: BaseStreamer | None
    started: float

    # Upstream asks it which arguments of `generate` are ours: none, so that it checks them all.
    __signature__ = inspect.Signature()

    def __call__(self, model, input_ids: torch.Tensor, **prepared: Any) -> torch.Tensor | SpecGenerateOutput:
        with model_context(model):
            return _decode(
                model,
                input_ids,
                options=self.options,
                output_streamer=self.streamer,
                started=self.started,
                **prepared,
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
    rule = Rule(logits_processor, bool(generation_config.do_sample))
    run = start_run(model, input_ids, attention_mask, generation_config, stopping_criteria, options, rule)
    check_processors(logits_processor, len(input_ids), run.plan.shape.nodes)
    run.prepare()
    if options.prepare_only:
        return run.result()
    if run.sequences.room() > 0:
        with run.timer.time("prefill"):
            run.prefill()
        run.statistics.ttft_s = time.perf_counter() - started
        run.add_phases()
        run.stream(output_streamer)
        while run.sequences.running():
            run.step()
            run.stream(output_streamer)
    if output_streamer is not None:
        output_streamer.end()
    run.statistics.total_s = time.perf_counter() - started
    return run.result()


def _check_supported(
    config: GenerationConfig, streamer: BaseStreamer | None, input_ids: torch.Tensor
) -> None:
    asked = [name for name in UNSUPPORTED if getattr(config, name, None)]
    if asked:
        raise ValueError(f"{', '.join(asked)}: this decoding loop has no such thing; leave it out.")
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams {config.num_beams}: beams have no draft tree; set num_beams=1.")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer takes one sequence, got {len(input_ids)}; stream prompts one by one.")
