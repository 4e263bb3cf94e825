"""Builds the model of a recipe: upstream's own class, the overlay's flash variant of it, or our engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import logging as transformers_logging

import huggingface.transformers  # noqa: F401 - registers the stream models and our attention function
from huggingface.transformers.integrations import flash_attention
from huggingface.transformers.models.gpt_neo.modeling_gpt_neo import SpecGPTNeoForCausalLM
from huggingface.transformers.models.spec_stream import (
    load_streaming,
    stock_config,
    stream_config_from,
    supported_architectures,
)
from huggingface.transformers.models.spec_stream.configuration_spec_stream import StreamConfig, StreamFields
from huggingface.transformers.quantizers.configuration import PackedWeightsConfig
from huggingface.transformers.quantizers.quantizer import quantize_head
from models.awq import METHOD as AWQ
from models.lm_head import split_head
from models.loading.calibrated import is_calibrated
from models.loading.checkpoint import has_streams, main_weights
from models.loading.packed import (
    PEERS,
    check_unquantized,
    loading_options,
    packed_config,
    saved_quantization,
)
from models.loading.random_weights import random_model
from models.technique import Recipe

STREAM_PREFIX = "streams."


@dataclass(frozen=True)
class BuiltModel:
    """A model with its weights, and what was built instead of what was asked for."""

    model: Any
    fallbacks: list[str] = field(default_factory=list)


def build_model(
    recipe: Recipe, checkpoint: str, config: PreTrainedConfig, device: str, random_weights: bool
) -> BuiltModel:
    """Returns the model of a resolved recipe on its device, in evaluation mode.

    Args:
        recipe: every slot decided.
        checkpoint: directory or hub id.
        config: the checkpoint's configuration.
        device: where the model goes.
        random_weights: draw the weights instead of reading them.

    Raises:
        ValueError: the weights are incomplete or unreadable, or the architecture lacks what the recipe needs.
    """
    saved = saved_quantization(checkpoint, config)
    check_unquantized(saved, recipe.weights, checkpoint)
    if random_weights and saved is not None and saved.get("quant_method") == AWQ:
        raise ValueError(
            f"{checkpoint} is an AWQ checkpoint, and awq is made from weights; leave out --random_weights."
        )
    make = _engine if recipe.decoder == "engine" else _stock
    with quiet(), readable(checkpoint):
        built = make(recipe, checkpoint, config, device, random_weights)
    if recipe.weights not in PEERS:  # those are where they belong, and some refuse to be moved
        built.model.to(device=device)
    built.model.eval()
    return built


def _stock(
    recipe: Recipe, checkpoint: str, config: PreTrainedConfig, device: str, random_weights: bool
) -> BuiltModel:
    plain = stock_config(config) if isinstance(config, StreamFields) else config
    model_class = _stock_class(plain, recipe)
    attention, fallbacks = _attention_of(model_class, recipe)
    choice = {} if attention is None else {"attn_implementation": attention}
    dtype = getattr(torch, str(recipe.dtype))
    if random_weights:
        return BuiltModel(
            random_model(model_class, plain, device, dtype, _packing(recipe), **choice), fallbacks
        )
    place = main_weights(checkpoint, config)
    model, found = model_class.from_pretrained(
        place,
        config=plain,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that check_keys can name them
        **loading_options(recipe.weights, dtype, device),
        **choice,
    )
    check_keys(found, place)
    return BuiltModel(model, fallbacks)


def _stock_class(config: PreTrainedConfig, recipe: Recipe) -> Any:
    """Returns upstream's class; for flash on GPT-Neo the overlay's, whose kernel keeps the local window."""
    if recipe.attention == "flash" and config.model_type == "gpt_neo":
        return SpecGPTNeoForCausalLM
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"model_type '{config.model_type}' is no causal language model; choose one that is."
        ) from None


def _attention_of(model_class: Any, recipe: Recipe) -> tuple[str | None, list[str]]:
    """Returns the attention to ask for, `None` for the class's default, and what it stands in for."""
    wanted = recipe.attention
    if wanted == "default":
        return None, []
    if wanted == "sdpa" and not model_class._supports_sdpa:
        return "eager", [f"{model_class.__name__} has no sdpa upstream: eager"]
    if wanted == "flash" and not model_class._supports_flash_attn:
        raise ValueError(f"{model_class.__name__} does not support FlashAttention; choose another technique.")
    return (flash_attention.NAME if wanted == "flash" else wanted), []


def _engine(
    recipe: Recipe, checkpoint: str, config: PreTrainedConfig, device: str, random_weights: bool
) -> BuiltModel:
    if recipe.drafts == "streams" and not has_streams(config) and not random_weights:
        raise ValueError(
            f"{checkpoint} has no streams, which spec_stream needs; train them with train_spec_stream.py "
            f"--mode adapter --model_name_or_path {checkpoint}."
        )
    dtype, attention = getattr(torch, str(recipe.dtype)), recipe.attention
    if random_weights:
        ours = config if isinstance(config, StreamFields) else _with_default_streams(config)
        engine = MODEL_FOR_CAUSAL_LM_MAPPING[type(ours)]
        packing = _packing(recipe)
        return BuiltModel(random_model(engine, ours, device, dtype, packing, attn_implementation=attention))
    # Its signature promises a model; with `output_loading_info` upstream's convention adds what was found.
    loaded: Any = load_streaming(
        checkpoint,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        # So that check_keys can name them; of a base model's weights nothing is told, and the first one ends the loading.
        ignore_mismatched_sizes=main_weights(checkpoint, config) == checkpoint,
        **loading_options(recipe.weights, dtype, device),
    )
    model, found = loaded
    check_keys(found, checkpoint)
    return BuiltModel(model, _read_as_it_is(model, recipe))


def _read_as_it_is(model: Any, recipe: Recipe) -> list[str]:
    """Returns what to tell of a model whose weights came scaled and packed; packs its head where the recipe says so."""
    config = getattr(model.config, "quantization_config", None)
    if not is_calibrated(recipe.weights) or config is None:
        return []
    if split_head(str(recipe.weights))[1]:
        quantize_head(model)
    return [f"the checkpoint's own AWQ weights, groups of {config.group_size}: no scales were searched"]


def _packing(recipe: Recipe) -> PackedWeightsConfig | None:
    """Returns how a recipe packs weights that are not read from a checkpoint; `None` for not at all, or not yet.

    Raises:
        ValueError: weights that another package quantises as it reads a checkpoint.
    """
    if recipe.weights in PEERS:
        raise ValueError(f"'{recipe.weights}' is made from a checkpoint; leave out --random_weights.")
    return packed_config(recipe.weights)


def _with_default_streams(config: PreTrainedConfig) -> PreTrainedConfig:
    if config.model_type not in supported_architectures():
        return stream_config_from(config)  # which says what is supported
    layers = min(StreamConfig().stream_layers, config.num_hidden_layers)
    return stream_config_from(config, stream_layers=layers)


def check_keys(found: dict[str, Any], place: str) -> None:
    """Raises ValueError if weights have other shapes than the config's, or main weights are missing or unknown.

    Missing and unknown stream weights are told where they are loaded.

    Args:
        found: what upstream's `from_pretrained` says with `output_loading_info` and `ignore_mismatched_sizes`.
        place: where the weights are, for the message.
    """
    wrong = [
        f"{key} {tuple(saved)} instead of {tuple(wanted)}"
        for key, saved, wanted in sorted(found.get("mismatched_keys", ()))
    ]
    if wrong:
        raise ValueError(
            f"the weights in {place} do not fit its config.json: {'; '.join(wrong[:5])} ({len(wrong)} of other shapes in "
            "all); restore config.json and the weights together."
        )
    missing, unexpected = (
        sorted(key for key in found.get(kind, ()) if not key.startswith(STREAM_PREFIX))
        for kind in ("missing_keys", "unexpected_keys")
    )
    if missing or unexpected:
        raise ValueError(
            f"the weights in {place} do not fit its config.json: missing {missing[:5]}, unexpected {unexpected[:5]} "
            f"({len(missing)} and {len(unexpected)} in all); restore config.json and the weights together."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silences upstream's loading report, which lists the stream weights that a stock class leaves unread, and its bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def readable(checkpoint: str) -> Iterator[None]:
    """Turns what reading weights can raise into one line that says what to do."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {checkpoint} are corrupt ({error}); download or save them again."
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"the base model of {checkpoint} holds weights of other shapes than config.json says; restore both together."
        ) from None
    except (LookupError, TypeError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"no model can be built from config.json of {checkpoint} ({told}); restore the file."
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the weights in {checkpoint} cannot be read ({reason}); only safetensors files are opened: save the model "
            "with save_pretrained, or fetch it again."
        ) from None
