"""The host's side of a batch: prompts without padding, emitted tokens, and where each sequence ends."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


@dataclass(frozen=True)
class StopRule:
    """When a sequence ends.

    Attributes:
        eos: token ids that end it; the token itself is emitted.
        max_new_tokens: tokens it may emit.
        criteria: upstream's criteria, asked after every token with that sequence alone.
        pad: token that fills ended sequences.
    """

    eos: frozenset[int]
    max_new_tokens: int
    criteria: list[StoppingCriteria] = field(default_factory=list)
    pad: int = 0


def stop_rule(config: GenerationConfig, criteria: StoppingCriteriaList, prompt: int) -> StopRule:
    """Returns the stop rule of a prepared call.

    Args:
        config: of the call.
        criteria: upstream's, of which the caller's own replace those that upstream makes of the configuration.
        prompt: tokens of a prompt, padding included.
    """
    eos: Any = config.eos_token_id
    longest = config.max_length
    others = []
    for one in criteria:
        if isinstance(one, MaxLengthCriteria):
            longest = one.max_length
        elif not isinstance(one, EosTokenCriteria):
            others.append(one)
        elif one.eos_token_id is not getattr(config, "_eos_token_tensor", None):
            eos = one.eos_token_id.tolist()
    ids = frozenset([eos] if isinstance(eos, int) else eos or ())
    pad = config.pad_token_id
    return StopRule(ids, longest - prompt, others, pad if pad is not None else min(ids, default=0))


class Sequences:
    """Prompts and emitted tokens of one call of `generate`.

    Attributes:
        prompt_lengths: tokens of each prompt, padding excluded.
        counts: tokens each sequence has emitted.
    """

    def __init__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, rule: StopRule, limit: int
    ):
        """Reads the prompts.

        Args:
            input_ids: (batch, seq) int64.
            attention_mask: (batch, seq), 0 at padding; `None` for no padding.
            rule: when sequences end.
            limit: positions the model has.

        Raises:
            ValueError: a prompt is empty or leaves no position for a new token.
        """
        self.rule = rule
        self.limit = limit
        self.input_ids = input_ids
        rows = input_ids.tolist()
        self._prompts = rows
        if attention_mask is not None:
            masks = attention_mask.tolist()
            self._prompts = [
                [token for token, kept in zip(row, mask, strict=True) if kept]
                for row, mask in zip(rows, masks, strict=True)
            ]
        self._inputs = rows
        self.prompt_lengths = [len(prompt) for prompt in self._prompts]
        for index, length in enumerate(self.prompt_lengths):
            if not length:
                raise ValueError(f"prompt {index} is empty; give at least one token, such as the BOS token.")
            if length >= limit:
                raise ValueError(
                    f"prompt {index} has {length} tokens and the model {limit} positions; shorten it to at most {limit - 1}."
                )
        self.emitted: list[list[int]] = [[] for _ in rows]
        self.counts = [0] * len(rows)
        self._reasons: list[str | None] = [None] * len(rows)
        self._changed = False
        self._streamed = 0

    def prompts(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (batch, longest) prompts padded on the right, so that slot and position agree, and their (batch,) lengths."""
        longest = max(self.prompt_lengths)
        lengths = torch.tensor(self.prompt_lengths, device=device)
        if min(self.prompt_lengths) == self.input_ids.shape[1] and self.input_ids.device == torch.device(
            device
        ):
            return self.input_ids.long(), lengths  # no padding: they are there already
        rows = [prompt + [self.rule.pad] * (longest - len(prompt)) for prompt in self._prompts]
        return torch.tensor(rows, device=device), lengths

    def room(self) -> int:
        """Returns the largest number of tokens a sequence may still emit before decoding starts."""
        return max(0, self.rule.max_new_tokens)

    def running(self) -> bool:
        """Returns whether a sequence has not ended."""
        return any(reason is None for reason in self._reasons)

    def committed(self) -> list[int]:
        """Returns the cache rows of each sequence: all tokens but the last emitted one."""
        return [
            length + max(count, 1) - 1 for length, count in zip(self.prompt_lengths, self.counts, strict=True)
        ]

    def depth_left(self, state) -> int:
        """Returns how deep the next tree may be: no deeper than the tokens still wanted, and within the positions."""
        active = [row for row, reason in enumerate(self._reasons) if reason is None]
        committed = self.committed()
        positions = min(self.limit - committed[row] for row in active)
        return min(self.wanted(), positions) - 1

    def wanted(self) -> int:
        """Returns how many tokens the running sequence that wants most may still emit."""
        active = [row for row, reason in enumerate(self._reasons) if reason is None]
        return max((self.rule.max_new_tokens - self.counts[row] for row in active), default=0)

    def extend(self, tokens: list[list[int]]) -> list[int]:
        """Adds tokens to running sequences until a stop rule ends them; returns how many each gained."""
        self._changed = False
        gained = []
        for row, new in enumerate(tokens):
            before = self.counts[row]
            for token in new:
                if self._reasons[row] is not None:
                    break
                self.emitted[row].append(token)
                self.counts[row] += 1
                self._reasons[row] = self._reason(row, token)
            self._changed |= before < self.counts[row] and self._reasons[row] is not None
            gained.append(self.counts[row] - before)
        return gained

    def _reason(self, row: int, token: int) -> str | None:
        if token in self.rule.eos:
            return "eos"
        if self.counts[row] >= self.rule.max_new_tokens:
            return "length"
        if self.prompt_lengths[row] + self.counts[row] >= self.limit:
            return "limit"
        if self.rule.criteria:
            ids = torch.tensor([self._inputs[row] + self.emitted[row]], device=self.input_ids.device)
            if any(bool(torch.as_tensor(rule(ids, None)).all()) for rule in self.rule.criteria):
                return "criteria"
        return None

    def go_on(self, tokens: list[list[int]]) -> bool:
        """Returns whether a sequence will still run when it has these tokens; `False` where the caller's criteria decide that."""
        if self.rule.criteria:
            return False
        for row, new in enumerate(tokens):
            count = self.counts[row] + len(new)
            room = min(self.rule.max_new_tokens, self.limit - self.prompt_lengths[row])
            if self._reasons[row] is None and count < room and self.rule.eos.isdisjoint(new):
                return True
        return False

    def newly_finished(self) -> bool:
        """Returns whether the last extension ended a sequence."""
        return self._changed

    def ended(self) -> list[bool]:
        """Returns which sequences have ended."""
        return [reason is not None for reason in self._reasons]

    def finished_mask(self, device: torch.device) -> torch.Tensor:
        """Returns (batch,) bool."""
        return torch.tensor(self.ended(), device=device)

    def histories(self) -> list[list[int]]:
        """Returns each sequence as upstream's processors see it: the input row, padding included, and what was emitted."""
        return [row + new for row, new in zip(self._inputs, self.emitted, strict=True)]

    def take_new(self) -> list[int]:
        """Returns what the first sequence emitted since the last call."""
        fresh = self.emitted[0][self._streamed :]
        self._streamed = len(self.emitted[0])
        return fresh

    def reasons(self) -> list[str]:
        """Returns why each sequence ended."""
        return [reason or "length" for reason in self._reasons]

    def padded(self, config: GenerationConfig, device: torch.device) -> torch.Tensor:
        """Returns (batch, seq + longest) int64: the inputs as given and the emitted tokens, padded on the right."""
        longest = max(self.counts)
        rows = [
            row + new + [self.rule.pad] * (longest - len(new))
            for row, new in zip(self._inputs, self.emitted, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.int64, device=device)
