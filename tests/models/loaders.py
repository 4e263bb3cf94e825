"""Loads techniques as tests want them: on the CPU, with a draft tree whose size no timing decides."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPTNeoForCausalLM, LlamaForCausalLM

from models import TECHNIQUES, Machine, fold
from models.loading import load

CPU = Machine("cpu")
PROMPT = "name[The Vaults], eatType[pub], priceRange[more than 30]"
LOSSY = ("half", "flash", "int8", "int4", "awq", "bnb_int8", "bnb_nf4", "torchao_int4")
"""Their answers need not be those of the baseline."""
EXACT = [name for name in TECHNIQUES if name not in LOSSY]
BATCHED = [name for name in EXACT if TECHNIQUES[name].largest_batch is None]
STOCK_CLASSES = {"gpt_neo": GPTNeoForCausalLM, "llama": LlamaForCausalLM}
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


def edited(checkpoint, tmp_path, **values):
    """A copy of a checkpoint with other values in its config."""
    directory = shutil.copytree(checkpoint, tmp_path / "edited")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))
    return directory
