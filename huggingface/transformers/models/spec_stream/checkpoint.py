"""Saving and loading streams: a whole model, or the streams alone beside a reference to their base model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ...quantizers.awq_checkpoint import translate_config

STREAM_PREFIX = "streams."


class StreamCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of a decoder with streams.

    With `config.base_model_name_or_path` set, the checkpoint holds the stream weights alone and the main weights come from there.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args: Any, **kwargs: Any):
        """Returns the model; see upstream's `from_pretrained` for the arguments.

        Raises:
            ValueError: the checkpoint lacks stream weights, holds unknown ones, or belongs to another base model.
        """
        init_streams = kwargs.pop("init_streams", False)
        config = kwargs.get("config")
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path)
            kwargs["config"] = config
        translate_config(config, str(pretrained_model_name_or_path))
        wanted_info = kwargs.pop("output_loading_info", False)
        base = getattr(config, "base_model_name_or_path", None)
        if base is not None and not init_streams:
            model, info = cls._from_base(pretrained_model_name_or_path, base, *args, **kwargs)
            return (model, info) if wanted_info else model
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if not init_streams:
            _check_stream_keys(pretrained_model_name_or_path, info)
        return (model, info) if wanted_info else model

    @classmethod
    def _from_base(cls, directory, base: str, *args: Any, **kwargs: Any):
        """Returns the base model's main weights with the streams of `directory`, and upstream's report on the base."""
        base_path = _beside(directory, base)
        config = kwargs["config"]
        families = {cls.stock_config_class.model_type, cls.config_class.model_type}
        base_config = translate_config(AutoConfig.from_pretrained(base_path), base_path)
        _check_same_base(config, base_config, families, directory, base_path)
        _quantize_as(config, base_config)
        # A base may have streams of its own, of another shape; they are replaced.
        kwargs["ignore_mismatched_sizes"] = True
        model, info = super().from_pretrained(base_path, *args, output_loading_info=True, **kwargs)
        _check_main_keys(base_path, info)
        _load_streams(model, Path(directory))
        model.generation_config = GenerationConfig.from_pretrained(directory)
        return model, info

    def save_pretrained(self, save_directory, *args: Any, state_dict: dict | None = None, **kwargs: Any):
        """Saves the model, or its streams alone where the configuration names a base model."""
        state_dict = self.weights_to_save() if state_dict is None else state_dict
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def weights_to_save(self) -> dict[str, torch.Tensor] | None:
        """Returns the weights of the streams where the main ones are the base model's; `None` for all there are."""
        return None if self.config.base_model_name_or_path is None else stream_weights(self)


def stream_weights(model) -> dict[str, torch.Tensor]:
    """Returns the weights of a model's streams by name."""
    return {name: one for name, one in model.state_dict().items() if name.startswith(STREAM_PREFIX)}


def _beside(directory: str | os.PathLike, base: str) -> str:
    """Returns the base model's path or hub id; a relative path starts at the streams' directory.

    Raises:
        ValueError: for a path that leads nowhere.
    """
    candidate = Path(directory) / base
    if candidate.is_dir():
        return str(candidate.resolve())
    if Path(base).is_absolute() or base.startswith("."):
        raise ValueError(
            f"the streams in {directory} need their base model, and {candidate} does not exist; put it there, or point "
            "base_model_name_or_path in config.json at it."
        )
    return base


def _check_same_base(config, base_config, families: set[str], directory, base_path: str) -> None:
    if base_config.model_type not in families:
        raise ValueError(
            f"the streams in {directory} belong to a {config.model_type} model, but the base model {base_path} is a "
            f"{base_config.model_type}; point base_model_name_or_path in config.json at the right base model."
        )
    for field in ("hidden_size", "num_hidden_layers", "vocab_size"):
        ours, theirs = getattr(config, field), getattr(base_config, field)
        if ours != theirs:
            raise ValueError(
                f"the streams in {directory} were trained for a model with {field} {ours}, but the base model {base_path} "
                f"has {theirs}; point base_model_name_or_path in config.json at the right base model."
            )


def _quantize_as(config, base_config) -> None:
    """Makes a configuration say of the main weights what that of the base model does: they are the base model's."""
    quantized = getattr(base_config, "quantization_config", None)
    if quantized is not None:
        config.quantization_config = quantized
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def _check_main_keys(base_path: str, info: dict[str, Any]) -> None:
    """Raises ValueError if the base model lacks main weights: upstream would have drawn them at random."""
    names = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape": [name for name, *_ in info.get("mismatched_keys", ())],
    }
    wrong = {kind: sorted(k for k in keys if not k.startswith(STREAM_PREFIX)) for kind, keys in names.items()}
    if any(wrong.values()):
        found = ", ".join(f"{kind} {keys[:5]}" for kind, keys in wrong.items())
        raise ValueError(
            f"the base model {base_path} does not hold the main weights that the streams were trained for: {found}; "
            "point base_model_name_or_path in config.json at the right one."
        )


def _check_stream_keys(directory, info: dict[str, Any], prefix: str = STREAM_PREFIX) -> None:
    """Raises ValueError for stream weights that are missing, and for unknown ones whose names start with `prefix`."""
    missing = sorted(key for key in info["missing_keys"] if key.startswith(STREAM_PREFIX))
    unexpected = sorted(key for key in info["unexpected_keys"] if key.startswith(prefix))
    if missing or unexpected:
        raise ValueError(
            f"the checkpoint {directory} does not hold the streams its config.json describes: missing {missing}, "
            f"unexpected {unexpected}; restore the files or train the streams again with train_spec_stream.py."
        )


def _load_streams(model, directory: Path) -> None:
    """Loads stream weights into `model`, every one of them and nothing else."""
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    absent = sorted(name for name in names if not (directory / name).is_file())
    if absent:
        raise ValueError(
            f"{directory} has no {', '.join(absent)} with stream weights; copy the whole checkpoint."
        )
    saved: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        saved |= load_file(directory / name)
    expected = stream_weights(model)
    _check_stream_keys(
        directory,
        {"missing_keys": expected.keys() - saved.keys(), "unexpected_keys": saved.keys() - expected.keys()},
        prefix="",  # the main weights are the base model's
    )
    shapes = {k: (tuple(saved[k].shape), tuple(v.shape)) for k, v in expected.items()}
    wrong = {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    if wrong:
        raise ValueError(
            f"stream weights in {directory} have shapes (saved, expected) {wrong}; the streams belong to another "
            "configuration: restore config.json and model.safetensors together."
        )
    model.load_state_dict(saved, strict=False)
