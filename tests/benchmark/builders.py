"""Small records, plans and checkpoints for tests."""

import json
import struct

from benchmark.plan import Cell, Contender, RunPlan, Turn
from benchmark.records import Record


def write_checkpoint(path, *, tensors=None, **config):
    path.mkdir(parents=True, exist_ok=True)
    base = {"model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "vocab_size": 100}
    (path / "config.json").write_text(json.dumps(base | config))
    header = json.dumps(tensors or {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return path


def a_plan(
    names=("naive", "static", "spec_stream"),
    prompts=2,
    repeats=1,
    batch_sizes=(1,),
    groups=None,
    twins=None,
    largest_batch=None,
):
    contenders = {}
    for name in names:
        engine = name not in ("naive", "half")
        recipe = {
            "decoder": "engine" if engine else "stock",
            "drafts": "streams" if name == "spec_stream" else None,
            "dtype": "float32",
        }
        contenders[name] = Contender(name, recipe, (twins or {}).get(name), (largest_batch or {}).get(name))
    ids = {"e2e_nlg": tuple(f"p{index}" for index in range(prompts))}
    return RunPlan(groups or (tuple(names),), ids, batch_sizes, repeats, contenders)


def a_record(name, prompt, tokens, total_s=1.0, ttft_s=0.5, repeat=0, index=None, **values):
    cell = Cell(name, "e2e_nlg", values.pop("batch_size", 1), values.pop("group", 0))
    turn = Turn(cell, repeat, int(prompt[1:]) if index is None else index, (prompt,))
    defaults = {
        "request": turn.request,
        "request_size": 1,
        "token_ids": tuple(tokens),
        "total_s": total_s,
        "ttft_s": ttft_s,
        "prompt_tokens": 3,
        "text": " text",
        "finish_reason": "eos",
    }
    return Record(
        cell.model_type, cell.dataset, cell.batch_size, prompt, repeat, cell.group, **(defaults | values)
    )
