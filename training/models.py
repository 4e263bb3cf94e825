"""The model that a run trains: random weights from a configuration, or a checkpoint that gets streams."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.arguments import DEFAULT_VOCAB_SIZE, TrainingFlags
from training.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DEFAULT_FIELDS = {
    "streams": 4,
    "stream_layers": 4,
    "lora_rank": 0,
    "transition_rank": 64,
    "pruning_rank": 0,
}
STREAM_FIELDS = tuple(DEFAULT_FIELDS)
ADAPTER_LORA_RANK = 32


@dataclass(frozen=True)
class ModelFile:
    """A `--model_config` file: upstream's configuration fields and ours."""

    architecture: dict[str, Any]
    stream_fields: dict[str, int]

    @property
    def vocab_size(self) -> int:
        """Tokens the file asks for."""
        return int(self.architecture.get("vocab_size", DEFAULT_VOCAB_SIZE))

    @property
    def layers(self) -> int:
        """Layers the file asks for, under any of the names that configurations use; 0 where it does not say."""
        return self._first(("num_hidden_layers", "num_layers", "n_layer"), 0)

    @property
    def positions(self) -> int:
        """Positions the file asks for; 2048 where it does not say."""
        return self._first(("max_position_embeddings", "n_positions"), 2048)

    def _first(self, names: tuple[str, ...], default: int) -> int:
        return next((int(self.architecture[name]) for name in names if name in self.architecture), default)


def read_model_file(path: Path) -> ModelFile:
    """Returns a model configuration file's fields. Raises ValueError if there is none to read."""
    if not path.is_file():
        raise ValueError(f"--model_config {path}: no such file; configs/spec_stream_9m.json is an example.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--model_config {path}: not JSON ({error}).") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f'--model_config {path}: needs \'model_type\', such as "gpt_neo" or "llama".')
    stream_fields = {name: values.pop(name) for name in STREAM_FIELDS if name in values}
    return ModelFile(values, stream_fields)


def wanted_fields(flags: TrainingFlags, known: dict[str, int], num_layers: int) -> dict[str, int]:
    """Returns the stream fields: flags first, then what the file or checkpoint says, then defaults.

    Args:
        flags: the run's flags.
        known: fields of the file or checkpoint.
        num_layers: layers of the model, which bound the default.
    """
    given = {name: getattr(flags, name) for name in STREAM_FIELDS if getattr(flags, name) is not None}
    default = {**DEFAULT_FIELDS, "stream_layers": min(DEFAULT_FIELDS["stream_layers"], num_layers)}
    if flags.mode == "adapter" and not known:
        default["lora_rank"] = ADAPTER_LORA_RANK
    return {**default, **known, **given}


def planned_fields(flags: TrainingFlags) -> dict[str, int]:
    """Returns the stream fields that the run's model is going to have; reads configurations alone.

    Raises:
        ValueError: for a missing file or directory, or an architecture that cannot carry streams.
        CheckpointError: for a configuration that cannot be read.
    """
    if flags.mode == "scratch":
        assert flags.model_config is not None
        file = read_model_file(flags.model_config)
        return wanted_fields(flags, file.stream_fields, stock_config_of(file).num_hidden_layers)
    assert flags.model_name_or_path is not None
    config = checkpoint_config(flags.model_name_or_path)
    return wanted_fields(flags, own_fields(config), config.num_hidden_layers)


def own_fields(config: Any) -> dict[str, int]:
    """Returns the stream fields of a checkpoint's configuration; none where it has no streams."""
    from huggingface.transformers.models.spec_stream import StreamConfig

    known = StreamConfig.of(config).as_dict() if hasattr(config, "stream_layers") else {}
    return {key: int(known[key] or 0) for key in STREAM_FIELDS} if known.get("streams") else {}


def check_resumed(flags: TrainingFlags, folder: Path) -> None:
    """Raises ValueError where the checkpoint to resume from has other streams than this run's model."""
    saved = own_fields(checkpoint_config(str(folder)))
    changed = [
        f"--{name} {saved.get(name, 0)}, not {value}"
        for name, value in planned_fields(flags).items()
        if saved.get(name, 0) != value
    ]
    if changed:
        raise ValueError(
            f"--resume_from_checkpoint: {folder} was trained with {', '.join(changed)}; give the flags that it began with, or "
            "another --output_dir."
        )


def stock_config_of(file: ModelFile, **fields: Any) -> Any:
    """Returns upstream's configuration of the file's architecture, with other values of some fields."""
    from transformers import AutoConfig

    from huggingface.transformers.models.spec_stream import supported_architectures

    values = {**file.architecture, **fields}
    kind = values.pop("model_type")
    if kind not in supported_architectures():
        supported = ", ".join(supported_architectures())
        raise ValueError(f"--model_config: model_type '{kind}' cannot carry streams; supported: {supported}.")
    return AutoConfig.for_model(kind, **values)


def model_from_file(flags: TrainingFlags, file: ModelFile, tokenizer: Any) -> Any:
    """Returns a streaming model with random weights of the file's architecture and the tokenizer's vocabulary."""
    from transformers import AutoModelForCausalLM

    from huggingface.transformers.models.spec_stream import stream_config_from
    from training.fresh_weights import shrink_queries, start_as_identity

    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    stock = stock_config_of(file, vocab_size=len(tokenizer), **special)
    fields = wanted_fields(flags, file.stream_fields, stock.num_hidden_layers)
    config = stream_config_from(stock, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=flags.attn_implementation)
    shrink_queries(model)
    start_as_identity(model)
    return model


def check_checkpoint(name: str) -> None:
    """Raises ValueError where a directory is meant and no checkpoint is in it; hub ids pass."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"--model_name_or_path {name} holds no config.json; give a checkpoint directory."
            )
    elif path.is_absolute() or name.startswith(".") or name.count("/") != 1 or path.parent.is_dir():
        raise ValueError(
            f"--model_name_or_path {name}: no such directory; give a checkpoint directory or a hub id."
        )


def checkpoint_config(name: str) -> Any:
    """Returns a checkpoint's configuration.

    Raises:
        ValueError: for a missing directory.
        CheckpointError: for a configuration that cannot be read.
    """
    from models.loading.checkpoint import read_config

    check_checkpoint(name)
    try:
        return read_config(name)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def model_from_checkpoint(flags: TrainingFlags) -> Any:
    """Returns the checkpoint's model in float32 with streams: its own, or fresh ones.

    Raises:
        ValueError: for a missing directory or an architecture that cannot carry streams.
        CheckpointError: for files that cannot be read.
    """
    from huggingface.transformers.models.spec_stream import load_streaming, stream_config_from
    from models.loading.checkpoint import main_weights
    from models.loading.weights import STREAM_PREFIX, check_keys, quiet, readable

    assert flags.model_name_or_path is not None
    name = flags.model_name_or_path
    config = checkpoint_config(name)
    own = own_fields(config)
    fields = wanted_fields(flags, own, config.num_hidden_layers)
    stream_config_from(config, **fields)  # says what is supported
    keep = bool(own) and fields == own
    main = main_weights(name, config)
    try:
        with quiet(), readable(name):  # upstream would report fresh streams as missing
            # Its signature promises a model; with `output_loading_info` upstream's convention adds what was found.
            loaded: Any = load_streaming(
                name if keep else main,
                stream_fields=None if keep else fields,
                attn_implementation=flags.attn_implementation,
                dtype=load_dtype(),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=not keep or main == name,
            )
        model, found = loaded
        wrong = found.get("mismatched_keys", ())
        if not keep:  # streams of another shape were replaced by fresh ones
            wrong = [item for item in wrong if not item[0].startswith(STREAM_PREFIX)]
        check_keys({**found, "mismatched_keys": wrong}, name)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return model


def load_dtype() -> torch.dtype:
    """Returns the dtype models are trained in; bfloat16 is left to autocast."""
    import torch

    return torch.float32


def freeze_main(model: Any) -> None:
    """Leaves only the streams to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("streams."))


def freeze_unused(model: Any) -> None:
    """Leaves out of training what no loss reaches: the pruning head, where no layer lies below the streams."""
    if model.first_stream_layer == 0 and model.config.pruning_rank:
        model.streams.pruning_down.requires_grad_(False)
        model.streams.pruning_up.requires_grad_(False)


def save_dtype(flags: TrainingFlags) -> torch.dtype:
    """Returns the dtype of the saved model: the flag's, else the given checkpoint's, else float32."""
    import torch
    from transformers import AutoConfig

    if flags.save_dtype != "auto":
        return getattr(torch, flags.save_dtype)
    if flags.mode == "scratch":
        return torch.float32
    assert flags.model_name_or_path is not None
    kept = AutoConfig.from_pretrained(flags.model_name_or_path).dtype
    return kept if isinstance(kept, torch.dtype) else torch.float32
