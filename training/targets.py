"""Self-distilled targets: what a model itself writes after the training prompts, kept on disk.

Streams must guess what their model will say, and references are many ways of saying it. Continuations are appended to a
JSON lines file as they come; its name is a digest of weights, prompts and length, so a cut run goes on where it stopped and a
changed model never meets old targets.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.tokens import TokenSet, pack_lists

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuer:
    """Writes greedy continuations with the plain decode loop.

    Attributes:
        model: the streaming model; its streams stay unused.
        eos_id, pad_id: end and padding token.
        max_new_tokens: longest continuation.
        batch_size: prompts at once.
    """

    model: Any
    eos_id: int
    pad_id: int
    max_new_tokens: int
    batch_size: int

    def __call__(self, prompts: Sequence[list[int]]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yields, batch by batch and longest prompts first, the prompts' indices and their continuations."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield chosen, self._batch([prompts[index] for index in chosen])

    @torch.no_grad()
    def _batch(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        longest = max(len(ids) for ids in prompts)
        device = self.model.device
        ids = torch.tensor([[self.pad_id] * (longest - len(row)) + row for row in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=device)
        room = self.model.config.max_position_embeddings - longest
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(1, min(self.max_new_tokens, room)),
            do_sample=False,
            drafts="none",
            eos_token_id=self.eos_id,
            pad_token_id=self.pad_id,
            return_dict_in_generate=True,
        )
        return [cut_at(row, self.eos_id) for row in output.sequences[:, longest:].tolist()]


def cut_at(ids: list[int], end: int) -> list[int]:
    """Returns the ids up to and with the first `end`."""
    return ids[: ids.index(end) + 1] if end in ids else ids


def unique_prompts(examples: TokenSet, limit_per_set: int | None = None) -> TokenSet:
    """Returns the first example of each different prompt, at most so many a set, completions as they are."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    counts = np.zeros(len(examples.names), np.int64)
    kept = []
    for index in range(len(examples)):
        set_id = int(examples.set_ids[index])
        key = (set_id, tuple(examples.example(index)[0]))
        if key in seen or (limit_per_set is not None and counts[set_id] >= limit_per_set):
            continue
        seen.add(key)
        counts[set_id] += 1
        kept.append(index)
    parts = [examples.example(index) for index in kept]
    prompts, completions = [part[0] for part in parts], [part[1] for part in parts]
    return pack_lists(prompts, completions, examples.set_ids[kept], examples.names)


def own_continuations(
    continuer: Continuer,
    examples: TokenSet,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> TokenSet:
    """Returns the examples with the model's own continuations as completions.

    Args:
        continuer: writes them.
        examples: prompts; their completions are not used.
        folder: where continuations are kept; None keeps none.
        share: (index of this process, number of processes); each process writes its share.
        wait: returns once every process has called it.
    """
    prompts = [examples.example(index)[0] for index in range(len(examples))]
    done: dict[int, list[int]] = {}
    if folder is None:
        for chosen, texts in continuer(prompts):
            done |= dict(zip(chosen, texts, strict=True))
    else:
        key = targets_key(continuer, prompts)
        write_missing(continuer, prompts, folder, key, share)
        wait()
        done = read_targets(folder, key)
    return pack_lists(prompts, [done[i] for i in range(len(prompts))], examples.set_ids, examples.names)


def targets_key(continuer: Continuer, prompts: Sequence[list[int]]) -> str:
    """Returns a digest of what decides the continuations: main weights, prompts, length and end token."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(continuer.model.state_dict().items()):
        if not name.startswith("streams."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    digest.update(json.dumps([list(prompts), continuer.max_new_tokens, continuer.eos_id]).encode())
    return digest.hexdigest()


def write_missing(
    continuer: Continuer, prompts: Sequence[list[int]], folder: Path, key: str, share: tuple[int, int]
) -> None:
    """Writes the continuations that no file in `folder` holds yet, this process's share of them."""
    folder.mkdir(parents=True, exist_ok=True)
    done = read_targets(folder, key)
    index, count = share
    missing = [place for place in range(len(prompts)) if place not in done and place % count == index]
    if done:
        logger.info("targets: %d of %d found in %s", len(done), len(prompts), folder)
    begin = time.monotonic()
    with (folder / f"{key}-{index}of{count}.jsonl").open("a", encoding="utf-8") as file:
        written = 0
        for chosen, texts in continuer([prompts[place] for place in missing]):
            rows = [{"prompt": missing[i], "ids": ids} for i, ids in zip(chosen, texts, strict=True)]
            file.write("".join(f"\n{json.dumps(row)}" for row in rows))
            file.flush()
            written += len(rows)
            pace = written / max(time.monotonic() - begin, 1e-9)
            logger.info("targets: %d of %d, %.1f a second", written, len(missing), pace)


def read_targets(folder: Path, key: str) -> dict[int, list[int]]:
    """Returns the continuations by prompt index; a line torn by a kill is left out."""
    done: dict[int, list[int]] = {}
    for path in sorted(folder.glob(f"{key}-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                done[int(row["prompt"])] = [int(token) for token in row["ids"]]
            except (ValueError, TypeError, KeyError):
                continue
    return done
