"""Our `generate`: the same loop with streams drafting or with nobody.

What is decided or built once for a batch size happens before a clock starts: the draft tree in `prepare`, captured graphs, which
depend on how tokens are picked, when `run` begins.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from huggingface.transformers.generation import graph_runner
from huggingface.transformers.generation.draft_settings import CONFIG_KEY
from huggingface.transformers.generation.tree_tuning import (
    DraftPlan,
    batch_class,
    plan_for,
    tune,
    tuned_nodes,
)
from huggingface.transformers.generation.verification import Rule
from models.answer import Limits
from models.loading.calls import Call, Prompts, generation_config, synchronise
from models.loading.memory import check_fits
from models.technique import Recipe


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
        self._captured: dict[int, tuple[float, int]] = {}
        self._checked: dict[int, int] = {}

    def prepare(self, prompts: Prompts) -> None:
        """Checks the memory and decides this batch size's draft tree; none of it is timed.

        Raises:
            MemoryError: the cache of such a call exceeds the device's free memory.
        """
        self._check_memory(prompts)
        self._decide_tree(len(prompts.ids))

    def _check_memory(self, prompts: Prompts) -> None:
        """Checks what a call with such prompts will hold, once for each batch size and again when it needs more.

        Graphs keep their caches: those of other batch sizes make room first, those of this one are not asked for twice.
        """
        batch, (capacity, scratch) = len(prompts.ids), self._cache_rows(prompts)
        if capacity <= self._checked.get(batch, 0):
            return
        if self.model.device.type != "cpu":
            graph_runner.release_runners(self.model)
        check_fits(self.model, batch, capacity, scratch)
        self._checked[batch] = capacity

    def _cache_rows(self, prompts: Prompts) -> tuple[int, int]:
        """Returns the rows of each sequence's cache, committed ones and those of a step."""
        batch, longest = prompts.ids.shape
        plan, rule = self._plan(batch), Rule(LogitsProcessorList())
        if graph_runner.uncaptured_reason(self.model, plan, rule) is not None:
            return longest + prompts.new_tokens, plan.shape.rows + plan.shape.depth + 1
        geometry = graph_runner.geometry_of(self.model, batch, longest, prompts.new_tokens, plan, rule, False)
        return geometry.capacity, plan.shape.nodes + 2 * (max(plan.shape.streams, plan.lookup) + 1)

    def _plan(self, batch: int) -> DraftPlan:
        if self.drafts == "none":
            return DraftPlan.plain()
        return plan_for(self.model, self.draft_nodes, batch)

    def _decide_tree(self, batch: int) -> None:
        """Decides the draft tree of a batch size; measures steps, for a few seconds, where nobody has before.

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

    def _capture(self, prompts: Prompts, config: GenerationConfig, record_phases: bool) -> None:
        """Has the model capture the graphs that such a call replays."""
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        # Capturing runs a step first, which may sample; the call itself must draw what it would have drawn.
        with torch.random.fork_rng(devices):
            self.model.generate(
                prompts.ids,
                attention_mask=prompts.mask,
                generation_config=config,
                drafts=self.drafts,
                draft_nodes=self.draft_nodes,
                record_phases=record_phases,
                prepare_only=True,
            )

    def run(
        self, prompts: Prompts, limits: Limits, record_phases: bool, acceptance_ratio: float | None
    ) -> Call:
        """Returns what the call did."""
        if acceptance_ratio is not None and self.drafts == "none":
            raise ValueError("an acceptance sweep needs a technique that drafts, such as spec_stream.")
        config = generation_config(prompts, limits, self.end_ids, self.pad_id, return_dict_in_generate=True)
        if acceptance_ratio is None:  # a sweep replaces drafts on the host, which no graph can
            self._capture(prompts, config, record_phases)
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
        batch = len(prompts.ids)
        capture_s, capture_bytes = self._captures(batch, told)
        return Call(
            rows=output.sequences[:, prompts.ids.shape[1] :].tolist(),
            ttft_s=told.ttft_s,
            total_s=total_s,
            steps=[_steps(told.steps, row) for row in range(batch)],
            kv_bytes=told.kv_bytes,
            phases_s=told.phases_s,
            draft_nodes=told.draft_nodes if self.drafts != "none" else None,
            draft_source=self._sources.get(batch_class(batch)),
            runner=told.runner,
            fallbacks=list(told.fallbacks),
            capture_s=capture_s,
            capture_bytes=capture_bytes,
        )

    def _captures(self, batch: int, told: Any) -> tuple[float, int]:
        """Returns seconds and bytes of this batch size's graphs; a call that only replays them may tell of nothing."""
        seconds, held = self._captured.get(batch, (0.0, 0))
        self._captured[batch] = max(seconds, told.capture_s), max(held, told.capture_bytes)
        return self._captured[batch]

    def plain(self, prompts: Prompts, limits: Limits) -> list[list[int]]:
        """Returns what each row emits with nothing drafted."""
        config = generation_config(prompts, limits, self.end_ids, self.pad_id)
        output = self.model.generate(
            prompts.ids, attention_mask=prompts.mask, generation_config=config, drafts="none"
        )
        return output[:, prompts.ids.shape[1] :].tolist()


def _steps(records: list[Any], row: int) -> list[dict[str, Any]]:
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
