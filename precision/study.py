"""A study from end to end: text, model, every unit alone, then plans at several budgets measured on text of their own."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type information

from benchmark import checkpoint as checkpoints
from benchmark import machine
from benchmark.errors import UsageError
from benchmark.hub_checkpoint import fetch
from benchmark.table import is_terminal
from huggingface.transformers.generation.perplexity import Likelihood
from huggingface.transformers.quantizers.packing import WeightFormat
from huggingface.transformers.quantizers.quantizer import convertible
from models.loading import load
from models.loading.tokenizing import encode, encode_continuation
from models.loading.weights import quiet
from models.machine import Machine
from models.precision_plan import PLAIN, normal_format
from models.technique import Recipe
from precision import planning
from precision.calibration import Sample, Text, cut, read_text
from precision.files import POINTS, UNITS, StudyFiles
from precision.measure import check_weights, likelihoods, measure_unit, nll_change, stored_as, stored_bytes
from precision.units import units

LONGEST_WINDOW = 512
CURVE = (1.05, 1.1, 1.25, 1.5, 1.75, 2.5)
"""Budgets of the curve's plans, besides the one asked for."""


@dataclass(frozen=True)
class Options:
    """What decides a study's numbers.

    Attributes:
        model_name_or_path: directory or hub id.
        text: `wikitext2`, `references` or a file.
        data_dir: folder with the official release files.
        kind: the trial format.
        by: what is quantised alone.
        tokens: judged tokens a unit, and as many others a plan.
        window: tokens of a sample of running text; `None` for the positions, at most `LONGEST_WINDOW`.
        dtype: of the arithmetic.
        device: where it runs.
        budget: bytes of the plan, as a multiple of those with everything in the trial format.
    """

    model_name_or_path: str
    text: str
    data_dir: Path | None
    kind: WeightFormat
    by: str
    tokens: int
    window: int | None
    dtype: str
    device: str
    budget: float


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: with its own weights.
        modules: its linear layers that would be quantised, by full name.
        study: samples that judge units.
        judge: samples that judge plans.
        dtype: of the arithmetic.
    """

    model: Any
    modules: Mapping[str, Any]
    study: list[Sample]
    judge: list[Sample]
    dtype: str


@dataclass(frozen=True)
class Findings:
    """A finished study.

    Attributes:
        rows: a measured unit each.
        points: a measured plan each, from the smallest to the largest.
        plan: what `plan.json` holds.
        about: the setting: model, text, tokens, dtype, perplexity of the plain model.
    """

    rows: list[dict[str, Any]]
    points: list[dict[str, Any]]
    plan: dict[str, Any]
    about: dict[str, Any]


def study(options: Options, files: StudyFiles, root: Path) -> Findings:
    """Measures what is not measured yet and returns everything.

    Args:
        options: what to measure.
        files: the study's folder.
        root: the project's folder, beside which checkpoints are looked for.

    Raises:
        UsageError: wrong flags, or a folder with another study. RunError, ValueError: a checkpoint, text or weights that
            cannot be used. In all these cases nothing is written.
    """
    name = options.model_name_or_path
    checkpoint = open_checkpoint(name, root)
    text = read_text(options.text, options.data_dir)
    device = machine.describe(options.device)["device"]
    resolved = Recipe(decoder="stock").resolved(Machine(device.partition(":")[0]), options.dtype)
    basis = {
        "model": checkpoint.fingerprint,
        "text": text.fingerprint,
        "format": format_fields(options.kind),
        "by": options.by,
        "tokens": options.tokens,
        "window": options.window or "auto",
        "dtype": resolved.dtype,
        "device": device.partition(":")[0],
    }
    files.check(basis)
    subject = _subject(options, resolved, checkpoint.path, device, text)
    before = likelihoods(subject.model, subject.study)
    about = _about(options, subject, text, sum(one.nll for one in before) / sum(one.tokens for one in before))
    files.begin(basis, about)
    rows = _measure_units(options, subject, before, files)
    points, plan = _measure_plans(options, subject, rows, files)
    return Findings(rows, points, plan | {"model": name, "text": options.text}, about)


def open_checkpoint(name: str, root: Path) -> checkpoints.Checkpoint:
    """Returns a checkpoint that can be quantised.

    Args:
        name: directory or hub id.
        root: the project's folder, beside which directories are looked for.

    Raises:
        UsageError: there is none, or its weights are packed already. RunError: it cannot be used.
    """
    checkpoint = checkpoints.inspect(checkpoints.locate(name, root) or fetch(name))
    if checkpoint.config.get("quantization_config"):
        raise UsageError(f"{name} is quantised already; give the checkpoint that it came from.")
    return checkpoint


def _subject(options: Options, recipe: Recipe, folder: Path, device: str, text: Text) -> Subject:
    loaded = load(recipe, folder, device)
    model, tokenizer, positions = loaded.model, loaded.tokenizer, loaded.position_limit
    window = options.window or min(positions, LONGEST_WINDOW)
    if window > positions:
        raise UsageError(
            f"--window got {window}, expected at most {positions}: the model has no more positions."
        )
    modules = convertible(model, [])
    if not modules:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise.")
    check_weights(modules)
    ways = partial(encode, tokenizer), partial(encode_continuation, tokenizer)
    with quiet():  # upstream warns of texts beyond the positions, and this one is cut afterwards
        remedy = "give a longer --text or a smaller --window"
        study_samples, judge_samples = cut(text, *ways, options.tokens, window, positions, remedy)
    return Subject(model, modules, study_samples, judge_samples, str(recipe.dtype))


def _about(options: Options, subject: Subject, text: Text, nll: float) -> dict[str, Any]:
    return {
        "model": options.model_name_or_path,
        "text": f"{options.text} from {text.source}"
        if text.source != Path(options.text).name
        else text.source,
        "format": format_name(format_fields(options.kind)),
        "by": options.by,
        "dtype": subject.dtype,
        "device": subject.model.device.type,
        "study_samples": len(subject.study),
        "study_tokens": sum(len(one.token_ids) for one in subject.study),
        "judge_samples": len(subject.judge),
        "judge_tokens": sum(len(one.token_ids) for one in subject.judge),
        "study_perplexity": math.exp(nll),
        "linear_layers": len(subject.modules),
        "weights": sum(module.weight.numel() for module in subject.modules.values()),
    }


def _measure_units(
    options: Options, subject: Subject, before: Sequence[Any], files: StudyFiles
) -> list[dict[str, Any]]:
    wanted = units(subject.modules, options.by)
    done = {row["unit"]: row for row in files.lines(UNITS)}
    left = [unit for unit in wanted if unit.name not in done]
    with closing(files.appender(UNITS)) as file:
        for unit in with_bar(left, f"{options.by}s"):
            row = measure_unit(subject.model, subject.modules, unit, options.kind, subject.study, before)
            file.append([row])
            done[unit.name] = row
    return [done[unit.name] for unit in wanted]


def _measure_plans(
    options: Options, subject: Subject, rows: Sequence[Mapping[str, Any]], files: StudyFiles
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the points of the curve, and the plan of the budget that was asked for."""
    groups = planning.groups(rows)
    default = format_fields(options.kind)
    chosen = {budget: planning.choose(groups, budget) for budget in sorted({*CURVE, options.budget})}
    wanted: dict[str, dict[str, WeightFormat | None]] = {
        f"all {format_name(default)}": dict.fromkeys(subject.modules, options.kind)
    }
    for budget, formats in chosen.items():
        modules = planning.plan(groups, formats, default)["modules"]
        wanted[f"plan {budget:g}"] = planned_kinds(subject.modules, modules, options.kind)
    if options.kind.bits != 8:
        wanted["all INT8"] = dict.fromkeys(subject.modules, WeightFormat(8))
    wanted[PLAIN] = dict.fromkeys(subject.modules)
    points = _measure_points(subject, wanted, files)
    own = next(one for one in points if f"plan {options.budget:g}" in one["names"])
    plan = planning.plan(groups, chosen[options.budget], default) | {
        "budget": options.budget,
        "bytes": own["bytes"],
        "default_bytes": round(own["bytes"] / own["times"]),
        "expected_nll_change": planning.expected_change(groups, chosen[options.budget]),
        "perplexity_ratio": own["perplexity_ratio"],
    }
    return points, plan


def planned_kinds(
    modules: Iterable[str], planned: Mapping[str, Any], default: WeightFormat
) -> dict[str, WeightFormat | None]:
    """Returns every linear layer's format, by name.

    Args:
        modules: their names.
        planned: a plan's `modules`.
        default: the format of those that the plan does not name.
    """
    return {name: _kind(planned[name]) if name in planned else default for name in modules}


def _measure_points(
    subject: Subject, wanted: Mapping[str, Mapping[str, WeightFormat | None]], files: StudyFiles
) -> list[dict[str, Any]]:
    """Returns a measured point for each way to store the weights; names of the same way share one."""
    names: dict[str, list[str]] = {}
    for name, kinds in wanted.items():
        names.setdefault(_digest(kinds), []).append(name)
    done = {row["plan"]: row for row in files.lines(POINTS)}
    before = likelihoods(subject.model, subject.judge)
    with closing(files.appender(POINTS)) as file:
        for digest in with_bar([digest for digest in names if digest not in done], "plans"):
            kinds = wanted[names[digest][0]]
            with stored_as(subject.modules, kinds):
                after = likelihoods(subject.model, subject.judge)
            done[digest] = {"plan": digest, **point(subject.modules, kinds, before, after)}
            file.append([done[digest]])
    least = done[next(iter(names))]["bytes"]
    return sorted(
        ({"names": them, "times": done[key]["bytes"] / least, **done[key]} for key, them in names.items()),
        key=lambda point: int(point["bytes"]),
    )


def point(
    modules: Mapping[str, Any],
    kinds: Mapping[str, WeightFormat | None],
    before: Sequence[Likelihood],
    after: Sequence[Likelihood],
) -> dict[str, Any]:
    """Returns what storing the linear layers in some formats costs, in bytes and perplexity.

    Args:
        modules: the linear layers, by full name.
        kinds: the format of each; `None` is half precision.
        before: likelihoods of the judging samples with the weights as they are.
        after: the same with the formats.
    """
    change, error = nll_change(before, after)
    tokens = sum(one.tokens for one in after)
    return {
        "bytes": sum(stored_bytes(modules[name], kind) for name, kind in kinds.items()),
        "perplexity": math.exp(sum(one.nll for one in after) / tokens),
        "perplexity_ratio": math.exp(change),
        "nll_change": change,
        "nll_change_error": error,
        "int8_layers": sum(kind is not None and kind.bits == 8 for kind in kinds.values()),
        "plain_layers": sum(kind is None for kind in kinds.values()),
    }


def format_name(fields: Mapping[str, Any]) -> str:
    """Returns a format in words, such as `INT4 g128`."""
    return f"INT{fields['bits']}" + (f" g{fields['group_size']}" if fields.get("group_size") else "")


def format_fields(kind: WeightFormat) -> dict[str, Any]:
    """Returns a format as a plan's fields."""
    return {"bits": kind.bits, "group_size": kind.group_size, "zero_point": kind.zero_point}


def _kind(value: Any) -> WeightFormat | None:
    fields = normal_format(value, "a module")
    return None if isinstance(fields, str) else WeightFormat(**fields)


def _digest(kinds: Mapping[str, WeightFormat | None]) -> str:
    text = json.dumps({name: kind and format_fields(kind) for name, kind in kinds.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def with_bar(items: Sequence[Any], title: str) -> Any:
    """Returns the items, with a progress bar on a terminal."""
    return tqdm(items, desc=title, disable=not items or not is_terminal(sys.stderr))
