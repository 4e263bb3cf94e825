"""How much a token's logits change when its step holds a whole draft tree instead of itself alone.

    python -m benchmark.logit_tolerance --model_name_or_path checkpoints/spec_stream_9m --output_dir results/tolerance

The same prefix, run once as a plain step and once as the root of a tree, goes through kernels that add up in another order. Two
tokens whose logits are closer than what this changes may swap: four times the largest difference is the gap below which a
different answer in half precision counts as rounding, not as an error. Writes `tolerance.json`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LogitsProcessorList

from benchmark.files import write_json
from datasets_code import DataError, get_dataset
from huggingface.transformers.generation.fused_step import FusedStep
from huggingface.transformers.generation.tree_tuning import BEAM, DraftPlan, make_plan
from huggingface.transformers.generation.verification import Rule
from huggingface.transformers.models.spec_stream.auto import load_streaming

SAFETY = 4
SETS = ("spider", "dialogsum", "e2e_nlg")
PREFIXES = (0, 4, 12, 24)
"""Tokens of the model's own answer after which a prefix ends, beside the prompt's."""

logger = logging.getLogger(__name__)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one call; exit code 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.logit_tolerance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint with streams")
    parser.add_argument("--data_dir", type=Path, help="folder of the data sets [own samples]")
    parser.add_argument("--limit", type=int, default=16, help="prompts of each data set [%(default)s]")
    parser.add_argument("--nodes", type=int, default=32, help="nodes of the tree, 2 to 64 [%(default)s]")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for tolerance.json")
    flags = parser.parse_args(words)
    if not 2 <= flags.nodes <= 64:
        parser.error(f"--nodes must be 2 to 64, got {flags.nodes}.")
    if not Path(flags.model_name_or_path).is_dir():
        parser.error(f"--model_name_or_path {flags.model_name_or_path}: no such directory.")
    try:
        source = "auto" if flags.data_dir else "samples"
        texts = [
            example.prompt.text
            for name in SETS
            for example in get_dataset(name).load("test", flags.data_dir, flags.limit, source=source).examples
        ]
    except (DataError, ValueError) as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model: Any = load_streaming(flags.model_name_or_path, dtype=getattr(torch, flags.dtype))
        tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model.to(device).eval()
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    prompts = [tokenizer(text, return_tensors="pt").input_ids.to(device) for text in texts]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": Path(flags.model_name_or_path).name,
        "dtype": flags.dtype,
        "nodes": flags.nodes,
        **measure(model, prompts, flags.nodes),
    }
    write_json(flags.output_dir / "tolerance.json", result)
    seen = f"{result['compared']} of {result['prefixes']} prefixes"
    largest, tolerance = result["largest_difference"], result["tolerance"]
    sys.stdout.write(f"largest logit difference {largest:.2g} over {seen}: tolerance {tolerance:.2g}\n")
    return 0


@torch.no_grad()
def measure(model: Any, prompts: Iterable[torch.Tensor], nodes: int) -> dict[str, Any]:
    """Returns the largest difference of the root's logits and what follows from it.

    Args:
        model: decoder with streams.
        prompts: (1, length) int64 each.
        nodes: of the tree.

    Raises:
        ValueError: no prefix led both steps to the same root, so nothing was compared.
    """
    tree = make_plan(model, nodes, model.streams.config.streams, BEAM)
    largest, compared, prefixes = 0.0, 0, 0
    for prefix in _prefixes(model, prompts):
        (root, plain), (other, drafted) = (root_logits(model, prefix, p) for p in (DraftPlan.plain(), tree))
        prefixes += 1
        # After a near-tie the prompt's last position may already have named another token.
        if root == other:
            compared += 1
            largest = max(largest, float((plain - drafted).abs().max()))
    if not compared:
        raise ValueError("no prefix could be compared; give other prompts.")
    return {
        "prefixes": prefixes,
        "compared": compared,
        "largest_difference": largest,
        "tolerance": SAFETY * largest,
    }


def _prefixes(model: Any, prompts: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    longest = model.config.max_position_embeddings - max(PREFIXES) - 8
    for prompt in prompts:
        if prompt.shape[1] > longest:
            logger.warning("a prompt of %d tokens is too long for the model and left out", prompt.shape[1])
            continue
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max(PREFIXES),
            do_sample=False,
            drafts="none",
        )
        for more in PREFIXES:
            if prompt.shape[1] + more <= answer.shape[1]:
                yield answer[:, : prompt.shape[1] + more]


def root_logits(model: Any, prefix: torch.Tensor, plan: DraftPlan) -> tuple[int, torch.Tensor]:
    """Returns the token that follows a prefix, and the logits (vocab,) in float32 of a step that has it as its root."""
    length = prefix.shape[1]
    step = FusedStep(model, 1, length + 1, plan, Rule(LogitsProcessorList()))
    step.prepare_prefill(length)
    step.prefill(prefix, torch.tensor([length], device=prefix.device))
    step.draft()
    step.forward()
    return int(step.state.root[0]), step.logits[0, 0].float()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    raise SystemExit(main())
