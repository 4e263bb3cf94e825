"""Times of captured steps at published shapes, beside what the memory could feed.

    python -m benchmark.step_times --output_dir results/steps

Weights are random: a step's time does not depend on them. One run holds everything that is compared: the bandwidth of the device,
plain and drafting steps, the step launched from Python, the prompt pass, attention beside PyTorch's own. Writes `steps.json` and
`steps.md`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from benchmark.device_times import copy_bandwidth, run, setting, timed
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.graph_runner import geometry_of, release_runners, runner_for
from huggingface.transformers.generation.step_record import PhaseTimer
from huggingface.transformers.generation.tree_tuning import BEAM, DraftPlan
from huggingface.transformers.generation.verification import Rule
from huggingface.transformers.integrations.tree_attention import (
    AttentionWorkspace,
    StepRows,
    tree_attention,
)

VOCABULARY, POSITIONS, GAMMA = 50257, 2048, 4
PROMPT, CONTEXT, NEW_TOKENS = 256, 320, 128
"""Tokens of the prompt pass; committed tokens of a timed step, a prompt of 256 and half of 128 new tokens; tokens of a call."""
TREES = (8, 16, 32, 64)
CARRIERS = (16, 12, 8)
"""Nodes that carry streams where not all of a tree of `EAGER_TREE` nodes do."""
EAGER_TREE = 32
PHASES = ("forward", "verify", "commit", "draft")


@dataclass(frozen=True)
class Shape:
    """A published decoder's size and the layers that carry streams."""

    layers: int
    hidden: int
    heads: int
    stream_layers: int


SHAPES = {
    "gpt_neo_125m": Shape(12, 768, 12, 4),
    "gpt_neo_1.3b": Shape(24, 2048, 16, 6),
    "gpt_neo_2.7b": Shape(32, 2560, 20, 8),
}
ATTENTION_ROWS = ((1, 0), (32, 0), (32, GAMMA))
ATTENTION_CONTEXTS = (320, 1500)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one call; exit code 2 for bad arguments or a device that captures nothing."""
    return run("benchmark.step_times", str(__doc__), SHAPES, "steps", measure, report, words)


def measure(names: Sequence[str], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yields, after each shape, everything that is measured so far, with hardware, versions and date."""
    ceiling = copy_bandwidth(device)
    result: dict[str, Any] = {
        **setting(device),
        "dtype": "bfloat16",
        "weights": "random, published shapes, vocabulary 50,257",
        "bandwidth_bytes_per_s": ceiling,
        "context": CONTEXT,
        "gamma": GAMMA,
        "shapes": {},
        "attention": [],
    }
    for name in names:
        result["shapes"][name] = measure_shape(SHAPES[name], device, ceiling)
        result["attention"] += measure_attention(SHAPES[name], device)
        yield result


def build(shape: Shape, device: torch.device) -> Any:
    """Returns a GPT-Neo with streams and random weights in bfloat16."""
    from huggingface.transformers.models.spec_stream.architectures.gpt_neo import (
        StreamGPTNeoConfig,
        StreamGPTNeoForCausalLM,
    )

    config = StreamGPTNeoConfig(
        vocab_size=VOCABULARY,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        attention_types=[[["global", "local"], shape.layers // 2]],
        max_position_embeddings=POSITIONS,
        streams=GAMMA,
        stream_layers=shape.stream_layers,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return StreamGPTNeoForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def measure_shape(shape: Shape, device: torch.device, ceiling: float) -> dict[str, Any]:
    """Returns the times of one shape."""
    model = build(shape, device)
    read = sum(p.nbytes for name, p in model.named_parameters() if ".h." in name)
    read += model.get_output_embeddings().weight.nbytes
    plain = measure_plan(model, DraftPlan.plain())
    trees = {str(nodes): measure_plan(model, _grown(nodes)) for nodes in TREES}
    for carriers in CARRIERS:
        plan = _grown(EAGER_TREE, carriers)
        trees[f"{EAGER_TREE}, streams at {carriers}"] = measure_plan(model, plan)
    eager = {str(nodes): measure_eager(model, nodes) for nodes in (1, EAGER_TREE)}
    result = {
        **asdict(shape),
        "weight_bytes_read": read,
        "floor_s": read / ceiling,
        "share_of_ceiling": read / ceiling / plain["step_s"],
        "plain": plain,
        "launched_from_python": eager,
        "trees": {name: {**tree, "ratio": tree["step_s"] / plain["step_s"]} for name, tree in trees.items()},
    }
    release_runners(model)
    return result


def _grown(nodes: int, carriers: int | None = None) -> DraftPlan:
    return DraftPlan(TreeShape((-1, *[0] * (nodes - 1)), GAMMA), beam=BEAM, carriers=carriers)


def measure_plan(model: Any, plan: DraftPlan) -> dict[str, Any]:
    """Returns seconds of a step, of its phases and of the prompt pass, and the share of a step that waits for the host.

    The timed sequences count as finished, so that every replay is the same step: none of them moves accepted rows of the cache.
    """
    rule = Rule(LogitsProcessorList())
    runner = runner_for(model, geometry_of(model, 1, PROMPT, NEW_TOKENS, plan, rule, False), rule)
    buffers = runner.step_buffers
    prompts = torch.randint(0, VOCABULARY, (1, PROMPT), device=model.device)
    lengths = torch.tensor([PROMPT], device=model.device)
    runner.prefill(prompts, lengths)
    prefill_s = timed(runner.replay_prefill(PROMPT))
    buffers.state.lengths.fill_(CONTEXT)
    buffers.state.finished.fill_(True)
    step_s = timed(runner.replay_step())
    phases = {
        phase: timed(_captured(getattr(buffers, phase)).replay) for phase in PHASES if _works(plan, phase)
    }
    runner.prefill(prompts, lengths)
    wall_s = _wall_seconds(runner)
    return {
        "step_s": step_s,
        "wall_s": wall_s,
        "host_share": max(0.0, 1 - step_s / wall_s),
        "prefill_s": prefill_s,
        "phases_s": phases,
        "capture_s": runner.capture_s,
    }


def _works(plan: DraftPlan, phase: str) -> bool:
    return plan.shape.nodes > 1 or phase != "commit"


def _captured(work: Callable[[], None]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _wall_seconds(runner: Any, steps: int = 24) -> float:
    """Returns wall seconds of a step as decoding takes it, the host's read of its tokens included."""
    timer = PhaseTimer(runner.device, False)
    for _ in range(4):
        runner.step(2 * steps, timer)
    started = time.perf_counter()
    for _ in range(steps):
        runner.step(2 * steps, timer)
    return (time.perf_counter() - started) / steps


def measure_eager(model: Any, nodes: int) -> dict[str, Any]:
    """Returns wall seconds of a step whose kernels are launched from Python, as before graphs, and of its phases."""
    prompts = torch.randint(0, VOCABULARY, (1, PROMPT), device=model.device)
    options: dict[str, Any] = {
        "drafts": "streams" if nodes > 1 else "none",
        "draft_nodes": nodes if nodes > 1 else None,
        "capture": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }

    def told(tokens: int, record_phases: bool) -> Any:
        return model.generate(
            prompts, max_new_tokens=tokens, do_sample=False, record_phases=record_phases, **options
        ).statistics

    told(4, False)
    plain, split = told(48, False), told(48, True)
    phases = {phase: split.phases_s[phase] / len(split.steps) for phase in (*PHASES, "host")}
    return {"step_s": (plain.total_s - plain.ttft_s) / len(plain.steps), "phases_s": phases}


def measure_attention(shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Returns seconds of our attention and of PyTorch's with a dense mask, layer after layer with caches of their own."""
    head = shape.hidden // shape.heads
    rows = []
    for context in ATTENTION_CONTEXTS:
        for nodes, streams in ATTENTION_ROWS:
            total = nodes * (1 + streams)
            size = (1, shape.heads, context + total, head)
            caches = [
                tuple(torch.randn(size, dtype=torch.bfloat16, device=device) for _ in "kv") for _ in range(12)
            ]
            ours, theirs = (
                _layers_seconds(attend, caches)
                for attend in _attentions(shape, context, nodes, streams, device)
            )
            rows.append(
                {
                    "heads": shape.heads,
                    "head_size": head,
                    "context": context,
                    "nodes": nodes,
                    "streams": streams,
                    "ours_s": ours,
                    "sdpa_s": theirs,
                }
            )
    return rows


def _layers_seconds(attend: Callable[..., object], caches: Sequence[tuple[torch.Tensor, ...]]) -> float:
    def work() -> None:
        for keys, values in caches:
            attend(keys, values)

    return timed(_captured(work).replay) / len(caches)


def _attentions(
    shape: Shape, context: int, nodes: int, streams: int, device: torch.device
) -> tuple[Callable[..., object], Callable[..., object]]:
    total, head = nodes * (1 + streams), shape.hidden // shape.heads
    bits = torch.tensor([[2 ** (node + 1) - 1 for node in range(nodes)]], device=device)
    depths = torch.arange(nodes, dtype=torch.int32, device=device)[None]
    step = StepRows(nodes, streams, bits, depths)
    projected = torch.randn(1, total, 3 * shape.hidden, dtype=torch.bfloat16, device=device)
    query = torch.randn(1, shape.heads, total, head, dtype=torch.bfloat16, device=device)
    mask = torch.zeros(1, 1, total, context + total, dtype=torch.bfloat16, device=device)
    lengths = torch.full((1,), context, device=device)
    workspace = AttentionWorkspace.for_step(1, total, shape.heads, shape.heads, head, context + total, device)
    attend = torch.nn.functional.scaled_dot_product_attention
    return (
        lambda keys, values: tree_attention(
            projected, keys, values, lengths, step, 1.0, None, workspace, settled=True
        ),
        lambda keys, values: attend(query, keys, values, attn_mask=mask),
    )


def report(result: dict[str, Any]) -> str:
    """Returns the tables in Markdown."""
    lines = [
        f"{result['device_name']}, {result['dtype']}, {result['weights']}, {result['date'][:10]}; torch {result['torch']}, "
        f"triton {result['triton']}. Ceiling: {result['bandwidth_bytes_per_s'] / 1e12:.2f} TB/s (copy, bytes read and written). "
        f"{result['context']} committed tokens, gamma {result['gamma']}. Phases: {', '.join(PHASES)}.",
        "",
        "| shape | rows | step ms | of the ceiling | to plain | host waits | prompt of 256, in plain steps | phases ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, shape in result["shapes"].items():
        lines += _shape_lines(name, shape)
    lines += [
        "",
        "| heads x size | context | nodes | streams | ours us | SDPA, dense mask, us |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['heads']} x {row['head_size']} | {row['context']} | {row['nodes']} | {row['streams']} | "
        f"{1e6 * row['ours_s']:.1f} | {1e6 * row['sdpa_s']:.1f} |"
        for row in result["attention"]
    ]
    return "\n".join(lines) + "\n"


def _shape_lines(name: str, shape: dict[str, Any]) -> list[str]:
    plain_s, floor_s = shape["plain"]["step_s"], shape["floor_s"]

    def start(label: str, seconds: float) -> str:
        return (
            f"| {name} | {label} | {1000 * seconds:.3f} | {floor_s / seconds:.0%} | {seconds / plain_s:.2f} |"
        )

    def phases(row: dict[str, Any]) -> str:
        return " / ".join(f"{1000 * row['phases_s'].get(phase, 0.0):.3f}" for phase in PHASES)

    def label(nodes: str) -> str:
        return "plain" if nodes == "1" else f"tree of {nodes}"

    lines = [
        f"{start(f'{label(nodes)}, launched from Python', row['step_s'])} | | {phases(row)} |"
        for nodes, row in shape["launched_from_python"].items()
    ]
    for nodes, row in {"1": shape["plain"], **shape["trees"]}.items():
        prefill = row["prefill_s"] / plain_s
        lines.append(
            f"{start(label(nodes), row['step_s'])} {row['host_share']:.1%} | {prefill:.2f} | {phases(row)} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
