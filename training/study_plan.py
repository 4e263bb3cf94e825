"""What a study trains: one job a variant, and for adapters the base and its texts, which all of them share.

A variant is named by what it is, so that two groups that both hold it train it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.arguments import MISSING, option
from training.models import DEFAULT_FIELDS, read_model_file

GROUPS = ("gamma", "layers", "transition", "lora")
GAMMAS = (2, 4, 6, 8)
STREAM_LAYERS = (1, 2, 3, 4, 8)
TRANSITION_RANKS = (0, 16, 64, 128)
LORA_RANKS = (0, 8, 32, 64)
COMPARED_LORA_RANK = 32  # the one that is trained on references too
HARD_SETS = ("spider", "dialogsum")  # seen twice an epoch, as by the model that ships


@dataclass(frozen=True)
class StudyFlags:
    """Everything that decides a study. Each field is a flag of the same name; its help text explains it."""

    output_dir: Path = option(MISSING, "folder for the variants, study.json and study.md")
    variants: tuple[str, ...] = option(GROUPS, "comma list of what to vary: gamma, layers, transition, lora")
    data_dir: Path | None = option(None, "folder with the official release files")
    datasets: tuple[str, ...] = option(
        ("spider", "dialogsum", "e2e_nlg"), "comma list of data sets; 'none' for none"
    )
    train_file: Path | None = option(None, "own data: JSON lines with 'prompt' and 'completion'")
    model_config: Path = option(
        Path("configs/spec_stream_9m.json"), "architecture, and the streams that vary"
    )
    minutes: float = option(3.0, "longest training of a variant")
    max_steps: int | None = option(
        None, "steps of a variant: alike for all, as minutes are not where several share a device"
    )
    jobs: int = option(4, "variants trained at the same time on one device")
    batch_rows: int = option(16384, "rows a step")
    learning_rate: float = option(1e-3, "highest learning rate")
    warmup_steps: int = option(200, "steps of linear warm-up before the cosine")
    calibration_prompts: int = option(64, "held-out prompts a set that acceptance is measured on")
    max_new_tokens: int = option(128, "longest continuation, of adapter targets and of the measurement")
    adapter_examples: int = option(
        4000, "training examples a set for adapters, whose base writes its own texts"
    )
    vocab_size: int | None = option(None, "tokens of the tokenizer [the config's]")
    bf16: bool = option(True, "bfloat16 training; leave out on a CPU")
    seed: int = option(0, "seed of weights, data order and held-out choice")

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in GROUPS:
                raise ValueError(f"--variants '{name}' is unknown; choose from {', '.join(GROUPS)}.")
        if not self.variants:
            raise ValueError(f"--variants names nothing to vary; choose from {', '.join(GROUPS)}.")
        for name in ("jobs", "calibration_prompts", "batch_rows", "max_steps", "adapter_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be 1 or more, got {value}.")
        if not self.minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {self.minutes}.")


@dataclass(frozen=True)
class Job:
    """One thing to be done in a process of its own.

    Attributes:
        name: also its folder's.
        kind: 'variant' is measured; 'base' and 'targets' are what adapters need first.
        settings: fields of :class:`training.arguments.TrainingFlags` as plain values.
        needs: name of the job that must be finished before.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    needs: str | None = None


@dataclass(frozen=True)
class Plan:
    """All jobs of a study, in order, and which variants each group compares."""

    jobs: tuple[Job, ...]
    groups: dict[str, tuple[str, ...]]


def plan_study(flags: StudyFlags) -> Plan:
    """Returns the jobs of the wanted groups. Raises ValueError for a model configuration that cannot be read."""
    file = read_model_file(flags.model_config)
    layers = file.layers
    usual = {**DEFAULT_FIELDS, **file.stream_fields, "lora_rank": 0, "pruning_rank": 0}
    usual["stream_layers"] = min(usual["stream_layers"], layers)
    varied = {
        "gamma": ("streams", GAMMAS),
        "layers": ("stream_layers", tuple(count for count in STREAM_LAYERS if count <= layers)),
        "transition": ("transition_rank", TRANSITION_RANKS),
    }
    jobs: dict[str, Job] = {}
    groups: dict[str, tuple[str, ...]] = {}
    for group in flags.variants:
        if group == "lora":
            found = adapter_jobs(flags, usual)
        else:
            field, values = varied[group]
            found = [scratch_job(flags, {**usual, field: value}) for value in values]
        jobs |= {job.name: job for job in found}
        groups[group] = tuple(job.name for job in found if job.kind == "variant")
    # What others wait for goes first.
    return Plan(tuple(sorted(jobs.values(), key=lambda job: job.kind == "variant")), groups)


def scratch_job(flags: StudyFlags, fields: dict[str, int]) -> Job:
    """Returns the job of a model trained from scratch together with its streams."""
    name = f"gamma{fields['streams']}_layers{fields['stream_layers']}_transition{fields['transition_rank']}"
    return Job(name, "variant", {**scratch_settings(flags, name), **fields})


def adapter_jobs(flags: StudyFlags, fields: dict[str, int]) -> list[Job]:
    """Returns the jobs of streams on one frozen base: the base, what it writes, and the variants."""
    base = Job("base", "base", {**scratch_settings(flags, "base"), "stream_loss_weight": [0.0]})
    base.settings["calibration_prompts"] = 0
    targets = Job("targets", "targets", adapter_settings(flags, "targets", fields), "base")
    wanted = [("own", rank) for rank in LORA_RANKS] + [("references", COMPARED_LORA_RANK)]
    variants = []
    for source, rank in wanted:
        name = f"adapter_lora{rank}_{source}"
        settings = adapter_settings(flags, name, {**fields, "lora_rank": rank})
        kept = settings["targets_dir"] if source == "own" else None
        variants.append(Job(name, "variant", {**settings, "targets": source, "targets_dir": kept}, "targets"))
    return [base, targets, *variants]


def scratch_settings(flags: StudyFlags, name: str) -> dict[str, Any]:
    """Returns the training flags of a model from scratch."""
    own = {"mode": "scratch", "model_config": str(flags.model_config), "bf16_weights": flags.bf16}
    return {**common_settings(flags, name), **own, "vocab_size": flags.vocab_size}


def adapter_settings(flags: StudyFlags, name: str, fields: dict[str, int]) -> dict[str, Any]:
    """Returns the training flags of streams on the frozen base."""
    own = {
        "mode": "adapter",
        "model_name_or_path": str(stock_folder(flags.output_dir)),
        "targets_dir": str(flags.output_dir / "targets" / "texts"),
        "limit": flags.adapter_examples,
        "bf16": flags.bf16,
        "target_batch_size": 256,
    }
    return {**common_settings(flags, name), **own, **fields}


def common_settings(flags: StudyFlags, name: str) -> dict[str, Any]:
    """Returns the training flags that all jobs share, but for their folder."""
    taken = (
        "batch_rows",
        "learning_rate",
        "warmup_steps",
        "max_steps",
        "calibration_prompts",
        "max_new_tokens",
    )
    return {
        **{field: getattr(flags, field) for field in (*taken, "seed")},
        "output_dir": str(flags.output_dir / name),
        "datasets": list(flags.datasets),
        "data_dir": text_or_none(flags.data_dir),
        "train_file": text_or_none(flags.train_file),
        "data_weights": [f"{name}=2" for name in HARD_SETS if name in flags.datasets],
        "max_train_minutes": flags.minutes,
        "weight_decay": 0.05,
        "eval_steps": 0,
        "save_steps": 0,
        "logging_steps": 200,
        "eval_examples": flags.calibration_prompts,
    }


def stock_folder(output_dir: Path) -> Path:
    """Returns where the base of the adapters is."""
    return output_dir / "base" / "stock"


def text_or_none(path: Path | None) -> str | None:
    """Returns a path as JSON can hold it."""
    return None if path is None else str(path)


def training_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as :class:`training.arguments.TrainingFlags` takes them: paths and tuples again."""
    paths = ("output_dir", "model_config", "data_dir", "train_file", "targets_dir")
    values = {name: Path(value) if name in paths and value else value for name, value in settings.items()}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def names_in_order(plan: Plan, groups: Sequence[str]) -> list[str]:
    """Returns the variants of some groups, each once."""
    return list(dict.fromkeys(name for group in groups for name in plan.groups[group]))
