"""Reads a checkpoint's configuration without running anything of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from huggingface.transformers.models.spec_stream.configuration_spec_stream import StreamFields

CODE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")


def read_config(checkpoint: str) -> PreTrainedConfig:
    """Returns the checkpoint's configuration.

    Raises:
        ValueError: there is none, it asks for code from outside the installed packages, or its architecture is unknown.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except OSError as error:
        raise ValueError(f"no usable config.json in {checkpoint}: {_first_line(error)}") from None
    refuse_code(values, checkpoint)
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a configuration class may fail on odd values in any way
        raise ValueError(
            f"{checkpoint} has model_type {values.get('model_type')!r}, which cannot be loaded: {_first_line(error)}; "
            "restore its config.json, or use another checkpoint."
        ) from None


def refuse_code(values: Mapping[str, Any], checkpoint: str) -> None:
    """Raises ValueError if a configuration, at any depth, asks for code from outside the installed packages."""
    for key, value in values.items():
        if key in CODE_KEYS and value:
            raise ValueError(
                f"config.json of {checkpoint} sets '{key}', which asks for code from outside the installed packages; nothing "
                "was run. Remove the key, or use an architecture that transformers itself has."
            )
        if isinstance(value, Mapping):
            refuse_code(value, checkpoint)


def has_streams(config: PreTrainedConfig) -> bool:
    """Returns whether a configuration describes streams."""
    return isinstance(config, StreamFields) and config.streams > 0


def main_weights(checkpoint: str, config: PreTrainedConfig) -> str:
    """Returns where the main model's weights are: a checkpoint of streams alone names its base model."""
    base = getattr(config, "base_model_name_or_path", None)
    if base is None:
        return checkpoint
    beside = Path(checkpoint) / base
    return str(beside.resolve()) if beside.is_dir() else str(base)


def end_tokens(checkpoint: str, config: PreTrainedConfig, tokenizer: Any) -> list[int]:
    """Returns the ids that end a text: of `generation_config.json`, else of the configuration, else the tokenizer's."""
    try:
        found = GenerationConfig.from_pretrained(checkpoint).eos_token_id
    except OSError:
        found = None
    for ids in (found, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        listed = [ids] if isinstance(ids, int) else list(ids or ())
        # An id beyond the vocabulary is a default of the configuration class that this model never had.
        known = [token for token in listed if 0 <= token < config.vocab_size]
        if known:
            return known
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
