"""`--model_type` -> the techniques of a run: names, recipes, exactness twins, and those that cannot run here."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from benchmark.config import RunConfig
from benchmark.errors import UsageError
from benchmark.plan import Contender
from models import TECHNIQUES, Recipe, fold, largest_batch, unavailable
from models.awq import unreadable
from models.precision_plan import read_plan

ALL = "all"
BASELINE = "naive"
SUBJECT = "spec_stream"
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
HOST_OVERHEAD = 800 << 20  # torch and transformers in a process of their own
DEVICE_OVERHEAD = 1200 << 20  # a CUDA context, its libraries and workspaces


@dataclass(frozen=True)
class Selection:
    """The techniques of a run.

    Args:
        contenders: name -> technique, the baseline first.
        skipped: name -> why it cannot run here.
        alone: the one technique the user named, where it was one.
    """

    contenders: Mapping[str, Contender]
    skipped: Mapping[str, str]
    alone: str | None


def wanted(config: RunConfig) -> tuple[str, ...]:
    """Returns the names to measure, the baseline first, checked without a machine.

    `naive` comes in front of a speculative stream named alone, so that there is something to compare with.

    Raises:
        UsageError: an unknown name, or names that do not combine.
    """
    names = tuple(TECHNIQUES) if config.model_type == (ALL,) else config.model_type
    if ALL in names:
        raise UsageError(
            "--model_type 'all' stands alone; name the techniques, or give 'all' and nothing else."
        )
    for name in names:
        _recipe(name, config)
    if len(names) == 1 and SUBJECT in names[0].split("+"):
        return (BASELINE, *names)
    return names


def unused_flags(config: RunConfig) -> list[str]:
    """Returns the flags that were given for techniques which are not in the run."""
    parts = {part.strip() for name in wanted(config) for part in name.split("+")}
    read = {item.name for part in parts for item in fields(TECHNIQUES[part])}  # type: ignore[arg-type]  # all are dataclasses
    given = [*config.technique_options, *(["assistant_model"] if config.assistant_model else [])]
    return [f"--{name}" for name in given if name not in read]


def check_precision_plan(config: RunConfig, tensors: Collection[str]) -> None:
    """Raises UsageError if a precision plan cannot be read, or names a layer that the checkpoint has no weight of.

    Args:
        config: the run's options.
        tensors: names of the checkpoint's tensors; with random weights there are none, and the worker looks at the model.
    """
    path = config.technique_options.get("precision_plan")
    if not path:
        return
    try:
        modules = read_plan(path)["modules"]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not tensors:
        return
    # A checkpoint of the decoder without its head leaves out the first part of every name.
    unknown = [
        name for name in modules if not any(f".{name}.weight".endswith(f".{tensor}") for tensor in tensors)
    ]
    if unknown:
        raise UsageError(
            f"--precision_plan {path} names {unknown[0]}, of which {config.model_name_or_path} holds no weight "
            f"({len(unknown)} such names in all); use a plan that sensitivity.py made for this model."
        )


def needs_assistant(config: RunConfig) -> bool:
    """Returns whether some technique of a run drafts with a small model, and the run names one."""
    return config.assistant_model is not None and any(
        _recipe(name, config).drafts == "assistant" for name in wanted(config)
    )


def select(
    config: RunConfig,
    machine: Mapping[str, Any],
    model_config: Mapping[str, Any],
    quantized: str | None = None,
) -> Selection:
    """Returns the techniques that can run on a machine, and why the others cannot.

    Args:
        config: the run's options.
        machine: what a worker said of the device.
        model_config: the checkpoint's `config.json`.
        quantized: how the checkpoint's main weights are quantised, `None` for not at all.

    Raises:
        UsageError: a technique named alone cannot run here, none can, or slots exclude each other.
    """
    alone = config.model_type[0] if len(config.model_type) == 1 and config.model_type != (ALL,) else None
    recipes: dict[str, Recipe] = {}
    skipped: dict[str, str] = {}
    for name in wanted(config):
        recipe = _recipe(name, config, machine)
        reason = (
            unavailable(name, machine, config.as_json())
            or unreadable(recipe.weights, quantized)
            or _without_streams(recipe, config, model_config)
            or _beyond_batch(name, config, every=name != alone)
        )
        if reason and name == alone:
            raise UsageError(f"--model_type {name} cannot run here: {reason}")
        if reason:
            skipped[name] = reason
        else:
            recipes[name] = recipe
    if not recipes:
        raise UsageError(f"no technique of --model_type can run here: {'; '.join(skipped.values())}")
    return Selection(_with_twins(recipes), skipped, alone)


def check_same_weights(config: RunConfig, techniques: Mapping[str, Any]) -> None:
    """Raises UsageError if a technique of a saved run would now store weights otherwise: a file has changed since.

    Args:
        config: the options, the same that the run was begun with.
        techniques: name -> what `config.json` holds of it.
    """
    now = {name: _recipe(name, config).weights for name in techniques}
    changed = [
        name for name, weights in now.items() if weights not in (None, techniques[name]["recipe"]["weights"])
    ]
    if changed:
        raise UsageError(
            f"how {', '.join(changed)} would store weights is not as when this run began: the file of a plan or of calibration "
            "text has changed. Restore it, or give another --run_name, or --overwrite."
        )


def _recipe(name: str, config: RunConfig, machine: Mapping[str, Any] | None = None) -> Recipe:
    try:
        return fold(name, config.as_json(), machine)
    except ValueError as error:
        raise UsageError(f"--model_type: {error}") from None


def _without_streams(recipe: Recipe, config: RunConfig, model_config: Mapping[str, Any]) -> str | None:
    if recipe.drafts != "streams" or model_config.get("streams") or config.random_weights:
        return None
    place = config.model_name_or_path
    return f"{place} has no streams; train them: train_spec_stream.py --mode adapter --model_name_or_path {place}"


def _beyond_batch(name: str, config: RunConfig, every: bool) -> str | None:
    """Returns why a technique cannot run at the batch sizes asked for: at `every` one, or at any."""
    most = largest_batch(name)
    too_large = [size for size in config.batch_size if most is not None and size > most]
    if not too_large or (every and len(too_large) < len(config.batch_size)):
        return None
    return (
        f"it runs at batch size {most} at most, and --batch_size asks for {', '.join(map(str, too_large))}."
    )


def _with_twins(recipes: Mapping[str, Recipe]) -> dict[str, Contender]:
    result = {}
    for name, recipe in recipes.items():
        plain = recipe.without_drafts()
        twins = [other for other, its in recipes.items() if recipe.drafts and its == plain]
        result[name] = Contender(name, recipe.to_json(), twins[0] if twins else None, largest_batch(name))
    return result


def estimates(
    contenders: Mapping[str, Contender], parameters: int, on_device: bool, assistant_parameters: int = 0
) -> dict[str, int]:
    """Returns the estimated memory in bytes of each worker: weights in its dtype, a quarter more for the cache, overhead.

    Args:
        contenders: the techniques.
        parameters: of the model.
        on_device: whether workers share an accelerator rather than the host's memory.
        assistant_parameters: of the assistant, which only the workers it drafts for load.
    """
    overhead = DEVICE_OVERHEAD if on_device else HOST_OVERHEAD
    result = {}
    for name, contender in contenders.items():
        assisted = contender.recipe.get("drafts") == "assistant"
        held = parameters + (assistant_parameters if assisted else 0)
        result[name] = int(held * BYTES.get(str(contender.recipe.get("dtype")), 4) * 1.25) + overhead
    return result
