"""The architectures that every conformance test runs on: what is special about each one's tiny model."""

from __future__ import annotations

from collections.abc import Iterable

WINDOW = 8
GROUPED = {"num_hidden_layers": 4, "intermediate_size": 32}
NO_DROPOUT = {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
FAMILIES: dict[str, dict] = {
    # One fused module makes query, key and value, its weight as (in, out).
    "gpt2": {
        "n_layer": 4,
        "n_head": 2,
        "n_inner": 40,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    # Unscaled scores; every second layer is local.
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
        **NO_DROPOUT,
    },
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, **GROUPED},
    # Every layer slides; three query heads a key head, and together wider than the hidden states.
    "mistral": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "sliding_window": WINDOW,
        **GROUPED,
    },
    # Biases on query, key and value; the upper layers slide, but for one.
    "qwen2": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_size": 24,
        "use_sliding_window": True,
        "sliding_window": WINDOW - 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        **GROUPED,
    },
}
"""Upstream's `model_type` to what is special about each architecture's tiny model."""
HEADS = {"gpt2": 2, "gpt_neo": 2, "llama": 4, "mistral": 6, "qwen2": 6}
SMALL_HEAD = {"gpt2": 8, "gpt_neo": 8, "llama": 4, "mistral": 4, "qwen2": 4}


def inner_field(architecture: str) -> str:
    """Returns what a configuration calls the width of its MLP."""
    return "n_inner" if architecture == "gpt2" else "intermediate_size"


def a_projection(names: Iterable[str], part: str) -> str:
    """Returns the name of a weight that makes `part`, such as `v_proj`, or of the fused one that makes it too."""
    return next(name for name in names if part in name or "c_attn.weight" in name)


def with_heads_of(architecture: str, size: int) -> dict[str, int]:
    """Returns the fields that give an architecture's tiny model heads of `size` features, such as the kernels know."""
    if architecture == "mistral":
        return {"head_dim": size}
    return {"hidden_size": size * HEADS[architecture]}
