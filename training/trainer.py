"""The trainer: upstream's `Trainer` with our data order, loss parts in the log, held-out acceptance, and a clean stop on NaN."""

# ruff: noqa: ARG002 - overridden methods and callbacks keep upstream's signature

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from training.arguments import TrainingFlags
from training.batches import Collator
from training.checkpoints import last_complete, mark_complete
from training.errors import DivergedError
from training.fresh_weights import slow_queries
from training.muon import MuonAdamW, muon_groups
from training.objective import StreamObjective
from training.optimiser import MasterAdamW
from training.ranks import NO_TOKEN, stream_ranks
from training.sampling import LengthGroupedSampler, RowBudgetSampler, WeightedDraw
from training.schedule import CosineSchedule, TimeLimit
from training.tokens import TokenSet

logger = logging.getLogger(__name__)
# With a wall-clock limit the clock ends the run, not the number of epochs; upstream still wants one.
EPOCHS_WITHOUT_END = 100_000


class OneDeviceArguments(TrainingArguments):
    """Upstream's arguments of a process that trains on one GPU, however many it sees.

    Upstream would give each of them a share of a batch in one process (`DataParallel`), which is slower than a process for each,
    and batches packed by rows have no such shares.
    """

    @property
    def n_gpu(self) -> int:
        """Returns how many GPUs the process uses."""
        return min(1, super().n_gpu)


def training_arguments(flags: TrainingFlags) -> TrainingArguments:
    """Returns upstream's arguments for our flags."""
    timed = flags.max_train_minutes is not None and flags.max_steps is None
    return OneDeviceArguments(
        output_dir=str(flags.output_dir),
        # With a budget of rows the sampler's items are whole batches.
        per_device_train_batch_size=1 if flags.batch_rows else flags.per_device_train_batch_size,
        gradient_accumulation_steps=flags.gradient_accumulation_steps,
        num_train_epochs=EPOCHS_WITHOUT_END if timed else flags.num_train_epochs,
        max_steps=flags.max_steps or -1,
        learning_rate=flags.learning_rate,
        weight_decay=flags.weight_decay,
        adam_beta2=flags.adam_beta2,
        max_grad_norm=flags.max_grad_norm,
        bf16=flags.bf16,
        seed=flags.seed,
        logging_steps=flags.logging_steps,
        eval_strategy="steps" if flags.eval_steps else "no",
        eval_steps=flags.eval_steps or None,
        save_strategy="steps" if flags.save_steps else "no",
        save_steps=flags.save_steps or 1,
        save_total_limit=flags.save_total_limit,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},  # else each step waits for the device
        disable_tqdm=True,
        log_level="error",
        report_to="none",
        ddp_find_unused_parameters=False,
    )


class StreamTrainer(Trainer):
    """Trains a :class:`StreamObjective` on packed examples.

    Args:
        objective: the model with its loss.
        flags: the run's flags.
        examples: what to train on.
        weights: how often each example is seen, (examples,).
        held_out: examples for the acceptance checks.
        tokenizer: saved beside each checkpoint.
        args: upstream's arguments, from :func:`training_arguments`.
    """

    def __init__(
        self,
        objective: StreamObjective,
        flags: TrainingFlags,
        examples: TokenSet,
        weights: np.ndarray,
        held_out: TokenSet,
        tokenizer: Any,
        args: TrainingArguments,
    ):
        streams = objective.model.config.streams
        with_prompts = flags.effective_prompt_loss_weight > 0
        collator = Collator(examples, streams, tokenizer.pad_token_id, with_prompts)
        super().__init__(
            model=objective,
            args=args,
            data_collator=collator.whole if flags.batch_rows else collator,
            train_dataset=examples,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        self.flags, self.example_weights = flags, weights
        self.objective: StreamObjective = objective
        self.examples, self.tokenizer = examples, tokenizer
        self.folder = flags.output_dir
        self.held_out_collator = Collator(held_out, streams, tokenizer.pad_token_id, with_prompts=False)
        self.masters: MasterAdamW | None = None
        self._metrics = torch.zeros(len(objective.metric_names), device=self.args.device)
        self._batches = 0
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressLines(objective.metric_names))
        if flags.max_train_minutes is not None:
            self.add_callback(TimeLimit(self._agree, saves=bool(flags.save_steps)))

    def _agree(self, seconds: float) -> float:
        """Returns the processes' mean reading on every process, so that all stop at the same step."""
        if self.args.world_size == 1:
            return seconds
        reading = torch.tensor(seconds, dtype=torch.float64, device=self.args.device)
        return float(self.accelerator.reduce(reading, "mean"))

    # Data and schedule.
    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler | RowBudgetSampler:
        examples, devices = self.examples, self.args.world_size
        draw = WeightedDraw(self.args.seed, self.example_weights, examples.set_ids)
        if not self.flags.batch_rows:
            group = self.flags.per_device_train_batch_size * devices
            return LengthGroupedSampler(draw, examples.lengths, group)
        config = self.objective.model.config
        stream_cost = config.streams * config.stream_layers / config.num_hidden_layers
        anchors = examples.lengths - examples.prompt_lengths - 1
        return RowBudgetSampler(draw, examples.lengths, anchors, stream_cost, self.flags.batch_rows, devices)

    def create_optimizer(self, model: Any = None) -> Any:
        """Returns AdamW, with Muon if asked; a new model's queries get their own pace, bfloat16 weights float32 copies."""
        if self.optimizer is not None:
            return self.optimizer
        groups = super().create_optimizer(model).param_groups
        if self.flags.optimizer == "muon":
            groups = muon_groups(groups, self.objective.model, self.flags.muon_learning_rate)
        if self.flags.mode == "scratch":
            groups = slow_queries(groups, self.objective.model)
        if self.flags.bf16_weights:
            self.optimizer = self.masters = MasterAdamW(groups)
        else:
            self.optimizer = MuonAdamW(groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns the cosine that ends with the run's steps or its clock."""
        if self.lr_scheduler is None:
            minutes = self.flags.max_train_minutes
            schedule = CosineSchedule(
                self.flags.warmup_steps, num_training_steps, None if minutes is None else 60 * minutes
            )
            chosen: Any = optimizer or self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, schedule)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # Loss and log.
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Returns the batch's loss and adds its parts to the log's running sums, without a device sync."""
        output = model(**inputs)
        self._metrics += output["metrics"]
        self._batches += 1
        return (output["loss"], output) if return_outputs else output["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs with the parts of the loss; raises DivergedError once the loss is no longer finite."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                self._stop_diverged(f"the loss became {logs['loss']} by step {self.state.global_step}")
            means = self.accelerator.reduce(self._metrics / max(self._batches, 1), "mean").tolist()
            logs |= dict(zip(self.objective.metric_names, means, strict=True))
            self._metrics.zero_()
            self._batches = 0
        super().log(logs, start_time)

    def _stop_diverged(self, what: str) -> None:
        good = last_complete(self.folder)
        kept = f"the last good checkpoint is {good}" if good else "no checkpoint was saved before"
        raise DivergedError(
            f"{what}; {kept}. Resume from it with a lower --learning_rate, or leave --bf16 out."
        )

    # Held-out acceptance.
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict:
        """Returns rank-1 accuracy by stream and the acceptance length of a chain, on held-out text.

        Teacher-forced against the model's own best token at each place: quick, and near what decoding will accept.
        """
        counts = self.accelerator.reduce(self._held_out_counts(), "sum").cpu().numpy()
        names = self.held_out_collator.examples.names
        metrics = acceptance_metrics(counts.sum(0), metric_key_prefix, every_stream=True)
        for name, part in zip(names, counts, strict=True):
            metrics |= acceptance_metrics(part, f"{metric_key_prefix}_{name}", every_stream=False)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _held_out_counts(self) -> torch.Tensor:
        """Returns (sets, 3, streams) sums over this process's share; see :func:`count_hits`."""
        examples = self.held_out_collator.examples
        model = self.objective.model
        was_training = model.training
        model.eval()
        total = torch.zeros(len(examples.names), 3, model.config.streams, device=self.args.device)
        size, world, rank = (
            self.flags.per_device_train_batch_size,
            self.args.world_size,
            self.args.process_index,
        )
        for set_id in range(len(examples.names)):
            members = np.flatnonzero(examples.set_ids == set_id)[rank::world]
            for start in range(0, len(members), size):
                batch = self._prepare_inputs(self.held_out_collator(members[start : start + size].tolist()))
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    total[set_id] += count_hits(stream_ranks(model, batch, own_choice=True))
        model.train(was_training)
        return total

    # Checkpoints.
    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            folder = output_dir or str(self.folder)
            save_whole(self.objective.model, folder)
            self.tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.objective.model
        saved = type(target).from_pretrained(
            resume_from_checkpoint, config=target.config, dtype=torch.float32
        )
        target.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        weights = [value for value in self.objective.parameters() if value.requires_grad]
        if not torch.stack([value.detach().isfinite().all() for value in weights]).all():
            self._stop_diverged(f"a weight is no longer finite at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(self.folder / f"checkpoint-{self.state.global_step}")


def save_whole(model: Any, folder: str | Path) -> None:
    """Saves main weights and streams, also of a model whose configuration names a base model."""
    base = model.config.base_model_name_or_path
    model.config.base_model_name_or_path = None
    try:
        model.save_pretrained(folder)
    finally:
        model.config.base_model_name_or_path = base


def count_hits(ranks: torch.Tensor) -> torch.Tensor:
    """Returns (3, streams): anchors with a token for the stream, those it guessed, those where all streams up to it guessed.

    Args:
        ranks: (anchors, streams) from :func:`training.ranks.stream_ranks`.
    """
    hits = ranks == 0
    chain = hits.cumprod(dim=1)
    return torch.stack([(ranks != NO_TOKEN).sum(0), hits.sum(0), chain.sum(0)]).float()


def acceptance_metrics(counts: np.ndarray, prefix: str, every_stream: bool) -> dict[str, float]:
    """Returns named accuracies and the acceptance length of a chain from the sums of :func:`count_hits`."""
    valid, hits, chain = counts
    shares = chain / np.maximum(valid, 1)
    metrics = {f"{prefix}_acceptance_length": round(1.0 + float(shares.sum()), 4)}
    if every_stream:
        accuracy = hits / np.maximum(valid, 1)
        metrics |= {
            f"{prefix}_stream_{j}_accuracy": round(float(a), 4) for j, a in enumerate(accuracy, start=1)
        }
    return metrics


class ProgressLines(TrainerCallback):
    """Writes one line a log: pace, loss, and each stream's loss and accuracy; held-out checks get a line of their own."""

    def __init__(self, metric_names: Sequence[str]):
        self.streams = sum(name.startswith("stream_") and name.endswith("_loss") for name in metric_names)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Writes the line, on the first process only."""
        if not state.is_world_process_zero or not logs:
            return
        if "main_loss" in logs:
            losses = "/".join(f"{logs[f'stream_{j}_loss']:.2f}" for j in range(1, self.streams + 1))
            rights = "/".join(f"{logs[f'stream_{j}_accuracy']:.2f}" for j in range(1, self.streams + 1))
            logger.info(
                "step %d epoch %.2f lr %.1e loss %.3f | main %.3f right %.2f | prompt %.3f | streams %s right %s",
                state.global_step,
                logs.get("epoch", 0.0),
                logs["learning_rate"],
                logs["loss"],
                logs["main_loss"],
                logs["main_accuracy"],
                logs["prompt_loss"],
                losses,
                rights,
            )
        elif any(key.startswith("eval_") for key in logs):
            shown = ", ".join(
                f"{key[5:]} {value:.3f}" for key, value in logs.items() if key.startswith("eval_")
            )
            logger.info("step %d held out: %s", state.global_step, shown)
