"""The flags of `train_spec_stream.py`: one frozen dataclass, and the parser made from it.

No torch here: `--help` and every argument error answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

Flags = TypeVar("Flags")
MODES = ("scratch", "joint", "adapter")
SAVE_DTYPES = ("auto", "float32", "bfloat16", "float16")
OPTIMIZERS = ("adamw", "muon")
TARGETS = ("own", "references")
DEFAULT_VOCAB_SIZE = 8192


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """Returns a dataclass field that is also a flag; a `default` of MISSING makes the flag required."""
    metadata = {"help": text, "choices": choices}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainingFlags:
    """Everything that decides a training run. Each field is a flag of the same name; its help text explains it."""

    mode: str = option(
        MISSING,
        "scratch: a new model and tokenizer from the data; joint: a checkpoint and its streams together; "
        "adapter: streams on a frozen checkpoint, which keeps its output",
        MODES,
    )
    output_dir: Path = option(MISSING, "folder for checkpoints and the trained model")
    model_name_or_path: str | None = option(None, "joint and adapter: checkpoint directory or hub id")
    model_config: Path | None = option(None, "scratch: JSON file with the architecture and its streams")
    vocab_size: int | None = option(
        None, f"scratch: tokens of the new tokenizer [config's, else {DEFAULT_VOCAB_SIZE}]"
    )
    datasets: tuple[str, ...] = option(
        ("spider", "dialogsum", "e2e_nlg"), "comma list of data sets; 'none' for none"
    )
    data_dir: Path | None = option(None, "folder with the official release files")
    train_file: Path | None = option(None, "own data: JSON lines with 'prompt' and 'completion'")
    validation_file: Path | None = option(None, "held-out part of the own data [2 %% of --train_file]")
    data_weights: tuple[str, ...] = option(
        (), "how often a set is seen in an epoch, such as spider=2,e2e_nlg=0.5"
    )
    limit: int | None = option(None, "at most so many training examples a set, for trials")
    max_length: int | None = option(None, "longest example in tokens [the model's context]")
    streams: int | None = option(None, "number of streams [the config's, else 4]")
    stream_layers: int | None = option(None, "top layers that carry streams [the config's, else 4]")
    lora_rank: int | None = option(
        None, "rank of the updates on stream rows [the config's, else 0; adapter 32]"
    )
    transition_rank: int | None = option(
        None, "rank of the bias from the preceding token [the config's, else 64]"
    )
    pruning_rank: int | None = option(None, "rank of the pruning head [the config's, else 0]")
    learning_rate: float = option(1e-3, "highest learning rate")
    optimizer: str = option(
        "adamw",
        "muon: orthogonalised steps for the layers' matrices, AdamW for the rest; learns in fewer steps, above all large models",
        OPTIMIZERS,
    )
    muon_learning_rate: float = option(2e-3, "muon: highest learning rate of the layers' matrices")
    weight_decay: float = option(0.01, "weight decay")
    max_grad_norm: float = option(1.0, "gradient clipping")
    warmup_steps: int = option(200, "steps of linear warm-up before the cosine")
    adam_beta2: float = option(
        0.999, "AdamW's memory of squared gradients; 0.95 for a short run of a large model"
    )
    per_device_train_batch_size: int = option(64, "examples a device and step")
    batch_rows: int | None = option(
        None,
        "rows a device and step instead of a number of examples: padded tokens, and stream rows by their share of the layers",
    )
    gradient_accumulation_steps: int = option(1, "batches an optimiser step")
    num_train_epochs: float = option(3.0, "passes over the data")
    max_steps: int | None = option(None, "optimiser steps, instead of epochs")
    max_train_minutes: float | None = option(
        None, "wall-clock limit; the learning rate reaches its end with it"
    )
    main_loss_weight: float = option(1.0, "weight of next-token loss on completions")
    stream_loss_weight: tuple[float, ...] = option(
        (0.5,), "weight of each stream's loss: one number or one a stream"
    )
    prompt_loss_weight: float | None = option(
        None, "weight of next-token loss on prompts [scratch 0.3, else 0]"
    )
    bf16: bool = option(False, "bfloat16 autocast")
    bf16_weights: bool = option(
        False, "bfloat16 weights with float32 copies in the optimiser: faster than --bf16; not for adapters"
    )
    compile: bool = option(False, "compile layers and losses: about a minute at the start, faster steps")
    attn_implementation: str = option("sdpa", "attention of the forward pass", ("sdpa", "eager"))
    seed: int = option(0, "seed of weights, data order and held-out choice")
    logging_steps: int = option(50, "steps between progress lines")
    eval_steps: int = option(500, "steps between held-out acceptance checks; 0 for none")
    eval_examples: int = option(64, "held-out examples a set in those checks")
    save_steps: int = option(1000, "steps between checkpoints; 0 for none, so nothing to resume from")
    save_total_limit: int = option(2, "checkpoints kept")
    resume_from_checkpoint: str | None = option(None, "'latest' or a checkpoint folder of an earlier run")
    save_dtype: str = option(
        "auto", "dtype of the saved model; auto: float32, or the given checkpoint's", SAVE_DTYPES
    )
    streams_only: bool = option(
        False, "adapter: save the streams alone, with a reference to the base checkpoint"
    )
    max_new_tokens: int = option(256, "longest continuation for own targets and calibration")
    targets: str | None = option(
        None,
        "joint, adapter: learn the data's references, or what the given checkpoint itself writes after the prompts "
        "[adapter own, joint references]",
        TARGETS,
    )
    targets_dir: Path | None = option(
        None,
        "folder of what the checkpoint wrote, which runs on the same checkpoint can share [output_dir/targets]",
    )
    target_batch_size: int = option(64, "prompts generated at once for own targets and calibration")
    calibration_prompts: int = option(64, "held-out prompts a set for calibration; 0 to leave it out")

    def __post_init__(self) -> None:
        self._check_mode()
        self._check_adapter()
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "batch_rows",
        ):
            self._at_least(name, 1)
        for name in ("limit", "max_steps", "streams", "target_batch_size", "max_new_tokens"):
            self._at_least(name, 1)
        for name in (
            "stream_layers",
            "lora_rank",
            "transition_rank",
            "pruning_rank",
            "warmup_steps",
            "eval_steps",
            "save_steps",
        ):
            self._at_least(name, 0)
        for name in ("calibration_prompts", "eval_examples", "main_loss_weight", "prompt_loss_weight"):
            self._at_least(name, 0)
        self._at_least("max_length", 2)
        self._at_least("save_total_limit", 2)  # the newest may be torn by a kill
        self._at_least("vocab_size", 257)
        for name in ("learning_rate", "muon_learning_rate", "num_train_epochs", "max_train_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} must be above 0, got {value}.")
        if any(weight < 0 for weight in self.stream_loss_weight) or not self.stream_loss_weight:
            raise ValueError(
                f"--stream_loss_weight takes numbers of 0 or more, got {self.stream_loss_weight}."
            )
        if not 0 < self.adam_beta2 < 1:
            raise ValueError(f"--adam_beta2 must lie between 0 and 1, got {self.adam_beta2}.")
        _ = self.set_weights

    def _check_mode(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"--mode {self.mode} is unknown; choose one of {', '.join(MODES)}.")
        if self.mode == "scratch" and self.model_config is None:
            raise ValueError(
                "--mode scratch needs --model_config FILE.json, for example configs/spec_stream_9m.json."
            )
        if self.mode == "scratch" and self.model_name_or_path is not None:
            raise ValueError(
                "--mode scratch starts from random weights; use --mode joint with --model_name_or_path."
            )
        if self.mode != "scratch" and self.model_name_or_path is None:
            raise ValueError(
                f"--mode {self.mode} needs --model_name_or_path, a checkpoint directory or hub id."
            )
        if self.mode != "scratch" and (self.model_config is not None or self.vocab_size is not None):
            raise ValueError(f"--model_config and --vocab_size belong to --mode scratch, not to {self.mode}.")
        if not self.datasets and self.train_file is None:
            raise ValueError("nothing to train on: give --datasets, --train_file, or both.")
        if self.validation_file is not None and self.train_file is None:
            raise ValueError("--validation_file needs --train_file.")

    def _check_adapter(self) -> None:
        if self.mode != "adapter" and self.streams_only:
            raise ValueError(
                "--streams_only belongs to --mode adapter: in other modes the main weights change too."
            )
        if self.bf16_weights and (self.bf16 or self.mode == "adapter"):
            raise ValueError(
                "--bf16_weights does not go with --bf16, which it replaces, nor with --mode adapter, whose base stays as it is."
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"--optimizer {self.optimizer} is unknown; choose one of {', '.join(OPTIMIZERS)}."
            )
        if self.optimizer == "muon" and self.mode == "adapter":
            raise ValueError(
                "--optimizer muon trains the layers' matrices, which --mode adapter leaves as they are."
            )
        if self.targets not in (None, *TARGETS):
            raise ValueError(f"--targets {self.targets} is unknown; choose one of {', '.join(TARGETS)}.")
        if self.mode == "scratch" and self.targets == "own":
            raise ValueError(
                "--targets own needs a model that can write already; train one with --mode scratch, then --mode joint."
            )
        if self.targets_dir is not None and not self.own_targets:
            raise ValueError("--targets_dir keeps what the checkpoint writes; it goes with --targets own.")

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be {least} or more, got {value}.")

    @property
    def set_weights(self) -> dict[str, float]:
        """How often each named set is seen in an epoch. Raises ValueError for a wrong item of --data_weights."""
        weights = {}
        for item in self.data_weights:
            name, _, number = item.partition("=")
            try:
                weights[name] = float(number)
            except ValueError:
                raise ValueError(f"--data_weights takes items such as spider=2, got '{item}'.") from None
            if name not in (*self.datasets, "train_file") or not weights[name] > 0:
                known = ", ".join((*self.datasets, "train_file"))
                raise ValueError(
                    f"--data_weights '{item}': the set must be one of {known}, the number above 0."
                )
        return weights

    @property
    def own_targets(self) -> bool:
        """Whether the checkpoint's own continuations are learnt instead of the references."""
        return (self.targets or ("own" if self.mode == "adapter" else "references")) == "own"

    @property
    def effective_prompt_loss_weight(self) -> float:
        """Weight of the loss on prompts after the mode's default."""
        if self.prompt_loss_weight is not None:
            return self.prompt_loss_weight
        return 0.3 if self.mode == "scratch" else 0.0


class FlagParser(argparse.ArgumentParser):
    """An argument parser that names the nearest known flag for an unknown one and exits with 2."""

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """Returns each flag's value by name."""
        parsed, unknown = self.parse_known_args(words)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return vars(parsed)

    def _unknown(self, word: str) -> str:
        near = difflib.get_close_matches(word.split("=")[0], list(self._option_string_actions), n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see --help for all flags."
        return f"unknown flag {word}{hint}"

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def build_parser(kind: type, program: str, description: str) -> FlagParser:
    """Returns the parser made from the fields of a dataclass of options."""
    parser = FlagParser(prog=program, description=description, allow_abbrev=False)
    hints = get_type_hints(kind)
    for item in fields(kind):
        add_flag(parser, item.name, hints[item.name], item.default, item.metadata)
    return parser


def add_flag(parser: argparse.ArgumentParser, name: str, hint: Any, default: Any, metadata: Any) -> None:
    """Adds one flag of type `hint` (bool, tuple, or a plain type, each also `| None`) to the parser in place."""
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)]
    plain = kinds[0] if kinds else hint
    text = metadata["help"] + ("" if default in (None, MISSING, (), False) else f" [{show(default)}]")
    if hint is bool:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=text)
    elif getattr(hint, "__origin__", None) is tuple:
        parser.add_argument(f"--{name}", type=CommaList(plain), default=default, help=text, metavar="A,B")
    else:
        parser.add_argument(
            f"--{name}",
            type=plain,
            default=None if default is MISSING else default,
            required=default is MISSING,
            choices=metadata["choices"],
            help=text,
        )


class CommaList:
    """Reads 'a,b' into a tuple of one type; 'none' or nothing into the empty tuple."""

    def __init__(self, kind: type):
        self.kind = kind
        self.__name__ = f"comma list of {kind.__name__}"

    def __call__(self, text: str) -> tuple[Any, ...]:
        if text in ("", "none"):
            return ()
        return tuple(self.kind(part.strip()) for part in text.split(",") if part.strip())


def show(value: Any) -> str:
    """Returns a flag's value as one would type it."""
    return ",".join(str(part) for part in value) if isinstance(value, tuple) else str(value)


def parse_flags(words: Sequence[str] | None = None) -> TrainingFlags:
    """Returns the flags of a command line; prints one line and exits with 2 on a mistake."""
    return flags_from(
        TrainingFlags,
        words,
        "train_spec_stream.py",
        "Train speculative streams: a small model from scratch, a checkpoint jointly, or streams alone.",
    )


def flags_from(kind: type[Flags], words: Sequence[str] | None, program: str, description: str) -> Flags:
    """Returns an options dataclass filled from a command line; prints one line and exits with 2 on a mistake."""
    parser = build_parser(kind, program, description)
    values = parser.values(words if words is not None else sys.argv[1:])
    try:
        return kind(**values)
    except ValueError as error:
        parser.error(str(error))


def command_of(flags: TrainingFlags) -> str:
    """Returns the command that repeats a run: every flag that differs from its default, absolute paths by their last part."""
    words = ["python train_spec_stream.py"]
    for item in fields(flags):
        value = getattr(flags, item.name)
        if value == item.default or item.name == "resume_from_checkpoint":
            continue
        if isinstance(value, bool):
            words.append(f"--{item.name}" if value else f"--no-{item.name}")
        else:
            text = show(value)
            words.append(f"--{item.name} {Path(text).name if Path(text).is_absolute() else text}")
    return " ".join(words)
