"""A loaded technique: prompts in, generations out.

Every rule that must be the same for all techniques stands here: how prompts are cut to the positions at hand, where a text ends,
which tokens count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from huggingface.transformers.generation.perplexity import (
    Likelihood,
    continuation_likelihood,
    text_likelihood,
)
from huggingface.transformers.generation.scoring import score_tokens
from huggingface.transformers.integrations import flash_attention
from models.answer import Generation, Limits, Perplexity, Scores
from models.loading.assistant import build_assistant
from models.loading.calibrated import is_calibrated, scale_and_pack
from models.loading.calls import Call, Decoder, Prompts
from models.loading.checkpoint import end_tokens, read_config
from models.loading.engine_decoder import EngineDecoder
from models.loading.memory import release_unused
from models.loading.packed import stored_bytes
from models.loading.stock_decoder import StockDecoder
from models.loading.tokenizing import decode, encode, encode_continuation, load_tokenizer
from models.loading.weights import build_model
from models.technique import Recipe

Prompt = str | Sequence[int]
LONGEST_WINDOW = 2048


@dataclass(frozen=True)
class Row:
    """A prompt as ids, cut to the room there is.

    Attributes:
        index: place among the request's prompts.
        ids: the prompt's ids that are used.
        new_tokens: tokens that may follow.
        truncated: whether ids were cut off.
    """

    index: int
    ids: list[int]
    new_tokens: int
    truncated: bool


class LoadedModel:
    """Answers prompts with one technique.

    Args:
        model: on its device, in evaluation mode.
        tokenizer: the checkpoint's.
        recipe: what was loaded, every slot decided.
        end_ids: ids that end a text.
        fallbacks: what was built instead of what was asked for.
        draft_nodes: nodes of the draft tree where the recipe leaves them open.
        tunes: before the first answer, measure which draft tree suits this device where the checkpoint does not know it.
        assistant: the small model that drafts, where the recipe has one; beside the model in all respects.

    After a request, `draft_nodes`, `draft_source`, `runner`, `capture_s` and `capture_bytes` are those of its last call,
    `kv_bytes` those of its largest; see :class:`models.loading.calls.Call`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        recipe: Recipe,
        end_ids: list[int],
        fallbacks: list[str],
        draft_nodes: int | str = "auto",
        tunes: bool = True,
        assistant: Any | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.end_ids = end_ids
        self.fallbacks = fallbacks
        self.dtype = str(recipe.dtype)
        held = [model] if assistant is None else [model, assistant]
        self.weight_bytes = sum(stored_bytes(parameter) for one in held for parameter in one.parameters())
        self.kv_bytes = 0
        self.draft_nodes: int | None = None
        self.draft_source: str | None = None
        self.runner: str | None = None
        self.capture_s: float | None = None
        self.capture_bytes: int | None = None
        self.position_limit = int(model.config.max_position_embeddings)
        self._pad_id = tokenizer.pad_token_id or 0
        self._known: dict[tuple[Any, ...], list[int]] = {}
        self._decoder: Decoder = (
            EngineDecoder(model, recipe, end_ids, self._pad_id, draft_nodes, tunes)
            if recipe.decoder == "engine"
            else StockDecoder(model, recipe, end_ids, self._pad_id, assistant)
        )

    @property
    def device_name(self) -> str:
        """The name of the device the model is on."""
        device = self.model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def generate(
        self,
        prompts: Sequence[Prompt],
        limits: Limits,
        *,
        record_phases: bool = False,
        acceptance_ratio: float | None = None,
    ) -> list[Generation]:
        """Returns one answer a prompt, in order. A prompt that cannot be used is an answer with an error.

        Args:
            prompts: texts, or token ids.
            limits: how long and by which rule.
            record_phases: measure where the time goes, at the price of some of it.
            acceptance_ratio: have drafts right at this rate instead of the technique's own.

        Raises:
            ValueError: the technique cannot do this, or `limits.on_long` is `error` and a prompt leaves no position.
            MemoryError: the cache of so many prompts exceeds the device's free memory.
        """
        self.kv_bytes = 0
        rows = [self._row(index, prompt, limits) for index, prompt in enumerate(prompts)]
        answers = {
            row.index: self._nothing(row) for row in rows if isinstance(row, Row) and not row.new_tokens
        }
        answers |= {index: row for index, row in enumerate(rows) if isinstance(row, Generation)}
        calls: dict[int, list[Row]] = {}
        for row in rows:
            if isinstance(row, Row) and row.new_tokens:
                calls.setdefault(row.new_tokens, []).append(row)
        for number, group in enumerate(calls.values()):
            batch = self._batch(group)
            if acceptance_ratio is not None:
                batch = replace(batch, known=self._known_tokens(batch, group, limits))
            call = self._run(batch, limits, record_phases, acceptance_ratio)
            answers |= {
                row.index: self._answer(row, place, call, number, limits) for place, row in enumerate(group)
            }
        return [answers[index] for index in range(len(prompts))]

    def score(self, prompt: Prompt, token_ids: Sequence[int], limits: Limits | None = None) -> Scores:
        """Returns what the model says of given tokens after a prompt.

        Args:
            prompt: text or ids.
            token_ids: the tokens to judge.
            limits: those the tokens were generated under, so that a long prompt is cut as it was then; without them it is cut to
                leave room for the tokens.

        Raises:
            ValueError: the prompt is empty and the model has no beginning-of-text token, or positions run out.
        """
        row = self._row(0, prompt, limits or Limits(max_new_tokens=len(token_ids)))
        if isinstance(row, Generation):
            raise ValueError(row.error)
        if len(row.ids) + len(token_ids) > self.position_limit:
            raise ValueError(
                f"{len(row.ids)} prompt and {len(token_ids)} answer tokens exceed the model's {self.position_limit} positions."
            )
        told = score_tokens(self.model, row.ids, list(token_ids))
        return Scores(told.logprobs.tolist(), told.margins.tolist(), told.gaps.tolist())

    def text_perplexity(
        self, text: str, window: int | None = None, stride: int | None = None, tokens: int = 0
    ) -> Perplexity:
        """Returns how well the model predicts a running text, in windows that move by a stride.

        Args:
            text: tokenised as a whole, with what the tokenizer puts in front of any text.
            window: tokens of a window; `None` for the model's positions, at most `LONGEST_WINDOW`.
            stride: tokens from one window to the next; `None` for half a window.
            tokens: take only the text's first so many; 0 for all.

        Raises:
            ValueError: the text is empty or one token, the window exceeds the positions, or the numbers are not finite.
        """
        window = window or min(self.position_limit, LONGEST_WINDOW)
        stride = stride or window // 2
        if window > self.position_limit:
            raise ValueError(
                f"a window of {window} tokens exceeds the model's {self.position_limit} positions."
            )
        ids = encode(self.tokenizer, text)
        told = text_likelihood(self.model, ids[:tokens] if tokens else ids, window, stride)
        return self._perplexity(told, window=window, stride=stride)

    def reference_perplexity(self, pairs: Sequence[Sequence[str]]) -> Perplexity:
        """Returns how well the model predicts texts that follow prompts, pooled over the texts' tokens.

        A prompt that leaves no room for its text loses its beginning; a text that alone exceeds the positions loses its end.

        Args:
            pairs: prompt and the text that follows it; prompts are not judged.

        Raises:
            ValueError: there is no token to judge, or the numbers are not finite.
        """
        total, skipped = Likelihood(0.0, 0), 0
        for prompt, text in pairs:
            ids = encode_continuation(self.tokenizer, prompt, text)[: self.position_limit - 1]
            row = self._row(0, prompt, Limits(max_new_tokens=len(ids)))
            if isinstance(row, Generation):
                skipped += 1
                continue
            total += continuation_likelihood(self.model, row.ids, ids)
        return self._perplexity(total, skipped=skipped)

    def _perplexity(self, told: Likelihood, **how: Any) -> Perplexity:
        """Returns the perplexity, or raises ValueError where there is no finite one."""
        value = told.perplexity
        if value is None:
            raise ValueError("there is no token to judge: the first token of a text follows nothing.")
        if not math.isfinite(value):
            raise ValueError(
                f"the perplexity is not finite in {self.dtype}; use --dtype bfloat16 or float32."
            )
        return Perplexity(value, told.nll, told.tokens, **how)

    def _row(self, index: int, prompt: Prompt, limits: Limits) -> Row | Generation:
        """Returns the prompt's ids with room for an answer, or why there is none."""
        ids = encode(self.tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            start = self.tokenizer.bos_token_id
            if start is None:
                return Generation.failed("the prompt is empty, and the model has no beginning-of-text token.")
            ids = [start]
        wanted = limits.max_new_tokens
        room = self.position_limit - len(ids)
        if limits.on_long == "truncate_left" and room < wanted:
            kept = ids[-max(self.position_limit - wanted, 1) :]
            return Row(index, kept, min(wanted, self.position_limit - len(kept)), len(kept) < len(ids))
        if room > 0 or (wanted == 0 and room == 0):
            return Row(index, ids, min(wanted, room), False)
        message = (
            f"the prompt has {len(ids)} tokens, which leaves no room in the model's {self.position_limit} positions; "
            "shorten it or use --on_long truncate_left."
        )
        if limits.on_long == "error":
            raise ValueError(message)
        return Generation.failed(message)

    def _batch(self, rows: Sequence[Row]) -> Prompts:
        """Returns the rows as one tensor, padded on the left."""
        longest = max(len(row.ids) for row in rows)
        gaps = [longest - len(row.ids) for row in rows]
        ids = [[self._pad_id] * gap + row.ids for gap, row in zip(gaps, rows, strict=True)]
        mask = [[0] * gap + [1] * len(row.ids) for gap, row in zip(gaps, rows, strict=True)]
        device = self.model.device
        return Prompts(
            torch.tensor(ids, device=device), torch.tensor(mask, device=device), rows[0].new_tokens
        )

    def _run(
        self, batch: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        self._decoder.prepare(batch)
        if limits.samples:
            torch.manual_seed(limits.seed)
        call = self._decoder.run(batch, limits, record_phases, acceptance_ratio)
        self.kv_bytes = max(self.kv_bytes, call.kv_bytes)
        self.draft_nodes, self.draft_source = call.draft_nodes, call.draft_source
        self.runner, self.capture_s, self.capture_bytes = call.runner, call.capture_s, call.capture_bytes
        return call

    def _known_tokens(self, batch: Prompts, rows: Sequence[Row], limits: Limits) -> list[list[int]] | None:
        """Returns what plain decoding emits for these rows, decoded once for all ratios of a sweep."""
        if not isinstance(self._decoder, EngineDecoder):
            return None
        if limits.samples:
            raise ValueError("an acceptance sweep needs greedy decoding; leave out --temperature.")
        keys = [(tuple(row.ids), limits) for row in rows]
        if any(key not in self._known for key in keys):
            self._known.update(zip(keys, self._decoder.plain(batch, limits), strict=True))
        return [self._known[key] for key in keys]

    def _nothing(self, row: Row) -> Generation:
        return Generation([], "", len(row.ids), None, 0.0, [], "length", list(self.fallbacks), row.truncated)

    def _answer(self, row: Row, place: int, call: Call, number: int, limits: Limits) -> Generation:
        """Returns one row's answer: its tokens up to the end-of-text token, and the call's times."""
        tokens = call.rows[place][: row.new_tokens]
        ends = () if limits.ignore_eos else self.end_ids
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        if end is not None:
            tokens, reason = tokens[: end + 1], "eos"
        else:
            reason = "length" if row.new_tokens == limits.max_new_tokens else "limit"
        return Generation(
            token_ids=tokens,
            text=decode(self.tokenizer, tokens),
            prompt_tokens=len(row.ids),
            ttft_s=call.ttft_s,
            total_s=call.total_s,
            steps=_steps_of(call.steps[place], len(tokens) - call.first),
            finish_reason=reason,
            fallbacks=list(dict.fromkeys([*self.fallbacks, *call.fallbacks])),
            truncated=row.truncated,
            phases_s=call.phases_s,
            call=number,
        )


def _steps_of(steps: list[dict[str, Any]], left: int) -> list[dict[str, Any]]:
    """Returns the steps that gave a row its `left` tokens after the first pass; a batch goes on after shorter rows have ended."""
    kept = []
    for step in steps:
        if left <= 0:
            break
        kept.append({**step, "emitted": min(step["emitted"], left)})
        left -= step["emitted"]
    return kept


def assemble(
    recipe: Recipe,
    checkpoint: str,
    device: str,
    *,
    assistant: str | None,
    draft_nodes: int | str,
    random_weights: bool,
) -> LoadedModel:
    """Returns the loaded model of a resolved recipe; see :func:`models.loading.load`."""
    config = read_config(checkpoint)
    tokenizer, notes = load_tokenizer(checkpoint, config.vocab_size, random_weights)
    helper = build_assistant(recipe, assistant, config.vocab_size, device, random_weights)
    built = build_model(recipe, checkpoint, config, device, random_weights)
    _check_finite(built.model, recipe, "model")
    if is_calibrated(recipe.weights) and getattr(built.model.config, "quantization_config", None) is None:
        scale_and_pack(built.model, tokenizer, str(recipe.weights))
    if helper is not None:
        _check_finite(helper.model, recipe, "assistant")
    release_unused(built.model.device)
    ends = end_tokens(checkpoint, config, tokenizer)
    if recipe.attention == "flash":
        notes = [*notes, flash_attention.describe(built.model.device)]
    return LoadedModel(
        built.model,
        tokenizer,
        recipe,
        ends,
        [*notes, *built.fallbacks, *(helper.fallbacks if helper else ())],
        draft_nodes,
        tunes=not random_weights,  # random streams are never right: there is nothing to tune for
        assistant=helper.model if helper else None,
    )


@torch.no_grad()
def _check_finite(model: Any, recipe: Recipe, name: str) -> None:
    """Raises ValueError if a short pass already gives infinite or undefined logits."""
    ids = torch.arange(min(8, model.config.vocab_size), device=model.device)[None]
    if not bool(torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()):
        advice = (
            "use --dtype bfloat16 or float32"
            if recipe.dtype == "float16"
            else f"the {name}'s checkpoint is damaged"
        )
        raise ValueError(f"the {name}'s logits are not finite in {recipe.dtype}; {advice}.")
