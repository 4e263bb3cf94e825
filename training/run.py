"""One training run from flags to a saved, calibrated model: the steps in order, each a function."""

from __future__ import annotations

import copy
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, GenerationConfig, TrainingArguments
from transformers.utils import logging as upstream_logging

import huggingface.transformers  # noqa: F401 - registers the stream models
from huggingface.transformers.generation.graph_runner import release_runners
from models.loading.checkpoint import read_config
from training.arguments import TrainingFlags
from training.calibration import Calibration, calibrate
from training.checkpoints import choose_checkpoint
from training.data import TextData, load_text
from training.errors import CheckpointError
from training.model_card import RunFacts, model_card
from training.models import (
    ModelFile,
    check_checkpoint,
    check_resumed,
    freeze_main,
    freeze_unused,
    model_from_checkpoint,
    model_from_file,
    read_model_file,
    save_dtype,
)
from training.objective import LossWeights, StreamObjective
from training.targets import Continuer, own_continuations, unique_prompts
from training.tokens import Encoded, TokenSet, encode_pairs, pack, train_tokenizer
from training.trainer import StreamTrainer, save_whole, training_arguments

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What a run trains on and with."""

    tokenizer: Any
    model: Any
    train: TokenSet
    held_out: TokenSet
    skipped: dict[str, int]


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; the calibration is None where it was left out, and on all processes but the first."""

    steps: int
    minutes: float
    calibration: Calibration | None


def run(flags: TrainingFlags) -> Path:
    """Trains, calibrates and saves a model; returns its folder. See :func:`train` for what it raises."""
    train(flags)
    return flags.output_dir


def train(flags: TrainingFlags) -> Outcome:
    """Trains, calibrates and saves a model in the flags' folder.

    Raises:
        ValueError: for a mistake in flags or data that shows before training.
        DataError: for a line that cannot be read.
        DivergedError: for a loss that is no longer finite.
    """
    resume = (
        choose_checkpoint(flags.resume_from_checkpoint, flags.output_dir)
        if flags.resume_from_checkpoint
        else None
    )
    if resume is not None:
        check_resumed(flags, resume)
    process = training_arguments(flags)
    if process.world_size < torch.cuda.device_count():
        logger.info(
            "%d GPUs are visible, %d trains; `python -m torch.distributed.run --standalone --nproc_per_node N "
            "train_spec_stream.py ...` uses N.", torch.cuda.device_count(), process.world_size
        )  # fmt: skip
    upstream_logging.disable_progress_bar()
    text = load(flags)
    with process.main_process_first(desc="preparing data and model"):
        prepared = prepare(flags, text, process.should_save, process.device)
    if flags.mode == "adapter":
        freeze_main(prepared.model)
    if flags.own_targets:
        prepare_targets(flags, prepared, process)
    trainer = make_trainer(flags, prepared, process)
    begin = time.monotonic()
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except torch.OutOfMemoryError:
        raise MemoryError(
            f"the device's memory does not hold a batch; lower {batch_flag(flags)} and raise --gradient_accumulation_steps by "
            "the same factor."
        ) from None
    minutes = (time.monotonic() - begin) / 60
    trainer.objective.forget_compiled()
    if trainer.masters is not None:
        trainer.masters.release()
    steps = trainer.state.global_step
    measured = finish(flags, prepared, text, steps, minutes) if process.should_save else None
    process.distributed_state.wait_for_everyone()
    return Outcome(steps, minutes, measured)


def batch_flag(flags: TrainingFlags) -> str:
    """Returns the flag that decides a batch's size, with its value."""
    name = "batch_rows" if flags.batch_rows else "per_device_train_batch_size"
    return f"--{name} {getattr(flags, name)}"


def load(flags: TrainingFlags) -> TextData:
    """Returns the run's text and says how much of it there is."""
    text = load_text(
        flags.datasets, flags.data_dir, flags.train_file, flags.validation_file, flags.limit, flags.seed
    )
    for part in text.sets:
        logger.info(
            "%s (%s): %d to train on, %d held out",
            part.name,
            part.source,
            len(part.train),
            len(part.held_out),
        )
        if part.note:
            logger.warning("%s: %s", part.name, part.note)
        if part.skipped:
            logger.warning("%s: %d rows had an unusable field and were skipped", part.name, part.skipped)
    return text


def prepare(flags: TrainingFlags, text: TextData, is_main: bool, device: torch.device) -> Prepared:
    """Returns tokenizer, model and tokenised examples; random weights are drawn on `device`, where that takes no time."""
    torch.manual_seed(flags.seed)
    if flags.mode == "scratch":
        assert flags.model_config is not None
        file = read_model_file(flags.model_config)
        tokenizer = scratch_tokenizer(flags, file, text, is_main)
        with device:
            model = model_from_file(flags, file, tokenizer)
    else:
        tokenizer = checkpoint_tokenizer(flags)
        model = model_from_checkpoint(flags)
    limit = min(
        flags.max_length or model.config.max_position_embeddings, model.config.max_position_embeddings
    )
    names = text.names
    train = [encode_pairs(tokenizer, part.train, limit) for part in text.sets]
    held_out = [encode_pairs(tokenizer, part.held_out, limit) for part in text.sets]
    skipped = report_lengths(names, train, limit)
    return Prepared(tokenizer, model, pack(train, names), pack(held_out, names), skipped)


def scratch_tokenizer(flags: TrainingFlags, file: ModelFile, text: TextData, is_main: bool) -> Any:
    """Returns the run's own tokenizer: trained by the first process, read from the run's folder by the others and on resume."""
    folder = flags.output_dir / "tokenizer"
    if (folder / "tokenizer.json").is_file() and (flags.resume_from_checkpoint or not is_main):
        return AutoTokenizer.from_pretrained(folder)
    pairs = [pair for part in text.sets for pair in part.train]
    tokenizer = train_tokenizer(pairs, flags.vocab_size or file.vocab_size, file.positions)
    logger.info("tokenizer: %d tokens", len(tokenizer))
    tokenizer.save_pretrained(folder)
    return tokenizer


def checkpoint_tokenizer(flags: TrainingFlags) -> Any:
    """Returns the checkpoint's tokenizer; a missing padding token becomes the end token."""
    assert flags.model_name_or_path is not None
    check_checkpoint(flags.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(flags.model_name_or_path)
    except (OSError, ValueError) as error:
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{flags.model_name_or_path} has no tokenizer that can be loaded ({first})."
        ) from None
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokenizer of {flags.model_name_or_path} has no end token; set eos_token in it."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def report_lengths(names: tuple[str, ...], parts: list[Encoded], limit: int) -> dict[str, int]:
    """Returns the number of prompts left out by set, after a warning for each; raises ValueError if a set has none left."""
    for name, part in zip(names, parts, strict=True):
        if not part.prompts:
            raise ValueError(
                f"'{name}': all {part.skipped_long} prompts are too long for {limit} tokens; raise --max_length or choose a "
                "model with a longer context."
            )
        if part.skipped_long:
            logger.warning(
                "%s: %d prompts longer than %d tokens were skipped", name, part.skipped_long, limit
            )
        if part.cut_completions:
            logger.warning("%s: %d completions were cut at %d tokens", name, part.cut_completions, limit)
    return {name: part.skipped_long for name, part in zip(names, parts, strict=True)}


def prepare_targets(flags: TrainingFlags, prepared: Prepared, process: TrainingArguments) -> None:
    """Replaces all completions, in place, by what the checkpoint itself writes: in bfloat16 where that is trained in."""
    prepared.model.to(process.device).eval()
    writer = prepared.model
    if flags.bf16 or flags.bf16_weights:
        writer = copy.deepcopy(writer)
        cast_weights(writer, torch.bfloat16)
    continuer = make_continuer(flags, prepared, writer)
    folder = flags.targets_dir or flags.output_dir / "targets"
    share = (process.process_index, process.world_size)
    wait = process.distributed_state.wait_for_everyone
    prepared.train = own_continuations(continuer, unique_prompts(prepared.train), folder, share, wait)
    held_out = unique_prompts(prepared.held_out, flags.eval_examples)
    prepared.held_out = own_continuations(continuer, held_out, folder, share, wait)
    release_runners(writer)


def make_continuer(flags: TrainingFlags, prepared: Prepared, model: Any = None) -> Continuer:
    """Returns what writes greedy continuations by the model, or by another with its tokenizer."""
    tokenizer = prepared.tokenizer
    return Continuer(
        model or prepared.model,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        flags.max_new_tokens,
        flags.target_batch_size,
    )


def make_trainer(flags: TrainingFlags, prepared: Prepared, process: TrainingArguments) -> StreamTrainer:
    """Returns the trainer of a prepared run."""
    freeze_unused(prepared.model)
    streams = prepared.model.config.streams
    given = flags.stream_loss_weight
    if len(given) not in (1, streams):
        raise ValueError(f"--stream_loss_weight takes 1 number or {streams}, one a stream; got {len(given)}.")
    main = 0.0 if flags.mode == "adapter" else flags.main_loss_weight
    prompt = 0.0 if flags.mode == "adapter" else flags.effective_prompt_loss_weight
    weights = LossWeights(main, prompt, given if len(given) == streams else given * streams)
    by_set = np.array([flags.set_weights.get(name, 1.0) for name in prepared.train.names])
    shown = (
        unique_prompts(prepared.held_out, flags.eval_examples) if flags.eval_examples else prepared.held_out
    )
    objective = StreamObjective(prepared.model, weights)
    if flags.compile:
        if prepared.model.config.lora_rank:
            raise ValueError("--compile does not take a model with lora_rank; leave one of them out.")
        objective.compile_parts()
    return StreamTrainer(
        objective,
        flags,
        prepared.train,
        by_set[prepared.train.set_ids],
        shown,
        prepared.tokenizer,
        process,
    )


def generation_config(model: Any, tokenizer: Any) -> GenerationConfig:
    """Returns the model's generation settings with the tokenizer's special tokens.

    Made anew: one that upstream derived from a model's configuration drops our entries when it is read back.
    """
    settings = model.generation_config.to_diff_dict()
    settings |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**{name: value for name, value in settings.items() if not name.startswith("_")})


def base_reference(flags: TrainingFlags) -> str:
    """Returns how streams name their base: a hub id as it is, a directory by its path.

    A base in the folder that the run's own folder is in is named from there, so that the two can move together.
    """
    name = str(flags.model_name_or_path)
    if not Path(name).is_dir():
        return name
    below = getattr(read_config(name), "base_model_name_or_path", None)
    if below is not None:  # streams alone, whose base is what ours stand on
        if not (Path(name) / below).is_dir():
            return str(below)
        name = str(Path(name) / below)
    base, folder = Path(name).resolve(), flags.output_dir.resolve()
    if base.is_relative_to(folder.parent):
        return Path(os.path.relpath(base, folder)).as_posix()
    return str(base)


def cast_weights(model: Any, dtype: torch.dtype) -> None:
    """Converts the weights in place, not the buffers: rotary frequencies in bfloat16 would turn a long prompt into another."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def finish(
    flags: TrainingFlags, prepared: Prepared, text: TextData, steps: int, minutes: float
) -> Calibration | None:
    """Saves the model, then calibrates it as saved and writes the draft-tree numbers and the model card beside it."""
    model, folder = prepared.model, flags.output_dir
    device = model.device
    model.eval().requires_grad_(False)
    dtype = save_dtype(flags)
    cast_weights(model, dtype)
    tokenizer = prepared.tokenizer
    model.generation_config = generation_config(model, tokenizer)
    if flags.streams_only:
        model.config.base_model_name_or_path = base_reference(flags)
        model.save_pretrained(folder)
    else:
        save_whole(model, folder)
    tokenizer.save_pretrained(folder)
    cast_weights(model, torch.float32)
    measured: Calibration | None = None
    if flags.calibration_prompts:
        logger.info("calibrating on held-out prompts")
        measured = calibrate(make_continuer(flags, prepared), prepared.held_out, flags.calibration_prompts)
    if measured is not None:
        model.generation_config.spec_stream = measured.as_dict()
        model.generation_config.save_pretrained(folder)
        for name, part in measured.sets.items():
            logger.info("%s: acceptance length by draft nodes %s", name, part.acceptance_length)
    facts = RunFacts(
        architecture=type(model).__name__,
        parameters=sum(value.numel() for value in model.parameters()),
        stream_parameters=sum(value.numel() for value in model.streams.parameters()),
        vocab_size=model.config.vocab_size,
        sets=[
            (part.name, part.source, len(part.train), part.skipped + prepared.skipped[part.name])
            for part in text.sets
        ],
        steps=steps,
        minutes=minutes,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(dtype).removeprefix("torch."),
        calibration=measured,
    )
    (folder / "README.md").write_text(model_card(flags, facts), encoding="utf-8")
    return measured
