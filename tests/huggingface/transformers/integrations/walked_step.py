"""Walks through captured steps for a GPU that is not there and compiles their kernels, in a process where none is interpreted.

Prints a JSON object: `asked`, the kernels that the walk asked for; `again`, how many of them a second walk, which finds what the
first one compiled, had to compile; `touched`, whether the walk changed a buffer.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
import triton
from transformers import LogitsProcessorList
from triton.backends.compiler import GPUTarget

from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.fused_step import FusedStep
from huggingface.transformers.generation.tree_tuning import BEAM, DraftPlan
from huggingface.transformers.generation.verification import Rule
from huggingface.transformers.integrations.compile_ahead import walk_through
from huggingface.transformers.integrations.skinny_linear import arrivals
from huggingface.transformers.models.spec_stream.architectures.gpt_neo import (
    StreamGPTNeoConfig,
    StreamGPTNeoForCausalLM,
)

OURS = "huggingface.transformers."


class Driver:
    """What Triton asks of a driver before it launches anything."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def model() -> StreamGPTNeoForCausalLM:
    config = StreamGPTNeoConfig(
        vocab_size=300, num_layers=2, hidden_size=256, num_heads=4, intermediate_size=512, window_size=32, streams=2,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=128, stream_layers=1, transition_rank=16,
    )  # fmt: skip
    return StreamGPTNeoForCausalLM(config).to(torch.bfloat16).eval()


def passes(step: FusedStep) -> None:
    step.prepare_prefill(64)
    step.prefill(torch.zeros(1, 64, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    step.forward()
    step.verify()
    step.commit()
    step.draft()


@torch.inference_mode()
def main() -> None:
    triton.runtime.driver.set_active(Driver())
    for module in modules():
        # Tensors are a CPU's here.
        for name, answer in (("unavailable", None), ("overlaps_launches", True)):
            if hasattr(module, name):
                setattr(module, name, lambda device, answer=answer: answer)
    plans = [DraftPlan(TreeShape((-1, 0, 0), 2), beam=1), DraftPlan(TreeShape((-1, *[0] * 7), 2), beam=BEAM)]
    decoder = model()
    steps = [FusedStep(decoder, 1, 96, plan, Rule(LogitsProcessorList())) for plan in plans]
    before = [buffer.clone() for step in steps for buffer in buffers_of(step)]
    walks = [walk(steps) for _ in range(2)]
    after = [buffer for step in steps for buffer in buffers_of(step)]
    assert len(walks[0]) == len(walks[1])
    told = {
        "asked": [name for name, _ in walks[0]],
        "again": sum(not hit for _, hit in walks[1]),
        "touched": not all(map(torch.equal, before, after)),
    }
    sys.stdout.write(json.dumps(told) + "\n")


def walk(steps: list[FusedStep]) -> list[tuple[str, bool]]:
    """Returns the kernels that a walk asks for, by name, and whether each was compiled already."""
    asked: list[tuple[str, bool]] = []
    triton.knobs.compilation.listener = lambda src, cache_hit, **told: asked.append(
        (src.fn.__name__, cache_hit)
    )
    for kernel in kernels():
        kernel.device_caches.clear()
    with ThreadPoolExecutor(2) as pool, triton.AsyncCompileMode(pool):
        walk_through([lambda step=step: passes(step) for step in steps])
    return asked


def buffers_of(step: FusedStep) -> list[torch.Tensor]:
    """Returns every tensor that lasts from one step to the next."""
    state, tree, drafting = step.state, step.tree, step.drafting
    held = [
        *vars(state).values(),
        *vars(tree).values(),
        *vars(drafting).values(),
        step.cache.block,
        step.packed,
        step.path,
        step.first,
    ]
    return [one for one in held if isinstance(one, torch.Tensor)] + [arrivals(torch.device("cpu"))]


def modules() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(OURS)]


def kernels() -> set[triton.runtime.JITFunction]:
    """Returns the kernels of all modules of ours that are loaded."""
    values = [value for module in modules() for value in vars(module).values()]
    return {value for value in values if isinstance(value, triton.runtime.JITFunction)}


if __name__ == "__main__":
    main()
