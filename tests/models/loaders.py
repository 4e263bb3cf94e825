"""Loads techniques as tests want them: on the CPU, with a draft tree whose size no timing decides."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GPT2LMHeadModel,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

from models import TECHNIQUES, Machine, fold
from models.loading import load

CPU = Machine("cpu")
PROMPT = "name[The Vaults], eatType[pub], priceRange[more than 30]"
LOSSY = ("half", "flash", "int8", "int4", "awq", "bnb_int8", "bnb_nf4", "torchao_int4")
"""Their answers need not be those of the baseline."""
EXACT = [name for name in TECHNIQUES if name not in LOSSY]
BATCHED = [name for name in EXACT if TECHNIQUES[name].largest_batch is None]
STOCK_CLASSES = {
    "gpt2": GPT2LMHeadModel,
    "gpt_neo": GPTNeoForCausalLM,
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
}
POSITIONS = 96
ASSISTANT = "assistant"


def loaded(name, checkpoint, **options):
    # Tuned trees depend on the machine's speed, and tests must not.
    options.setdefault("draft_nodes", 8)
    if name == "assisted":
        options.setdefault("assistant", Path(checkpoint) / ASSISTANT)
    return load(fold(name, options.pop("flags", None), CPU), checkpoint, "cpu", **options)


def upstream_tokens(architecture, checkpoint, prompt, new_tokens):
    """What plain upstream code emits, nothing of ours involved."""
    model = STOCK_CLASSES[architecture].from_pretrained(checkpoint).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(checkpoint).encode(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
    )
    tokens = output[0, ids.shape[1] :].tolist()
    return tokens[: tokens.index(0) + 1] if 0 in tokens else tokens


def cached_bytes(config, tokens, windows=True):
    """Bytes of float32 keys and values that upstream keeps of so many tokens; its sliding layers drop what no query will see."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if windows else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    kept = [
        min(tokens, window - 1) if window is not None and kind == "sliding_attention" else tokens
        for kind in kinds
    ]
    return 2 * sum(kept) * heads * width * 4


def edited(checkpoint, tmp_path, **values):
    """A copy of a checkpoint with other values in its config."""
    directory = shutil.copytree(checkpoint, tmp_path / "edited")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))
    return directory
