"""What every format does to a trained model's perplexity: as trained, and with outliers that leave its output as it was.

Large models have channels far larger than the others, small ones hardly; `add_outliers` gives them some by moving a factor from
weights to norms. Weights are packed and read back in place (`precision.measure`). Tokens that choose something, AWQ's scales and
plans, are never those that judge.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import expm1
from pathlib import Path
from typing import Any

import torch

from huggingface.transformers.generation.perplexity import Likelihood
from huggingface.transformers.quantizers.awq import scale_for_quantization
from huggingface.transformers.quantizers.channel_scaling import ISOLATED, RUN, RUNS, add_outliers
from huggingface.transformers.quantizers.packing import WeightFormat
from huggingface.transformers.quantizers.quantizer import convertible
from models.loading import load
from models.loading.calibrated import WINDOW, WINDOWS
from models.loading.tokenizing import encode, encode_continuation
from models.loading.weights import quiet
from models.technique import Recipe
from precision import planning
from precision.calibration import REFERENCES, Sample, Text, cut, read_text
from precision.measure import check_weights, likelihoods, measure_unit, nll_change, stored_as
from precision.study import LONGEST_WINDOW, Subject, format_fields, planned_kinds, point, with_bar
from precision.units import MODULE, units

TRAINED = "as trained"
FACTOR = 16.0
"""How much larger outliers are; a power of two, so that no number of the output changes in any dtype."""
SHARES = {ISOLATED: 16, RUNS: 4}
"""One channel in so many is an outlier; runs are whole, and there is one at least."""
PLAIN, GROUPS, AWQ, PLAN = "plain", "int4 g128", "awq g128", "plan"
TRIAL = WeightFormat(4, 128)
FORMATS = {
    PLAIN: None, "int8": WeightFormat(8), "int4 naive": WeightFormat(4), GROUPS: TRIAL, "int4 g32": WeightFormat(4, 32),
}  # fmt: skip
BUDGET = 1.25
CALIBRATION_BATCHES = 4
"""AWQ keeps a few rows of each batch for its errors; so many batches let it fill its rows evenly."""


@dataclass(frozen=True)
class Texts:
    """What there is to read.

    Attributes:
        judge: judges.
        choose: chooses; `None` where the former is cut in halves.
    """

    judge: Text
    choose: Text | None


def read_texts(name: str, data_dir: Path | None) -> Texts:
    """Returns the texts that a flag names: of `references`, validation rows judge, and training rows choose.

    A reference of both chooses nothing. Where no other is left, as in the project's own samples, one half of the rows chooses.

    Args:
        name: `references`, `wikitext2` or a text file; the latter two are cut in halves.
        data_dir: folder with the official release files; without it the hub, else the project's own samples.

    Raises:
        MissingDataError: a folder or file is not there. DataError: it cannot be read. ValueError: there is no text in it.
    """
    if name != REFERENCES:
        return Texts(read_text(name, data_dir), None)
    judge, train = read_text(name, data_dir), read_text(name, data_dir, "train")
    judged = {text for _, text in judge.pairs}
    others = tuple(pair for pair in train.pairs if pair[1] not in judged)
    return Texts(
        judge, replace(train, pairs=others) if others else None
    )  # the project's samples have one split


def read_subject(
    recipe: Recipe, folder: Path, device: str, texts: Texts, tokens: int, plan_tokens: int
) -> Subject:
    """Returns a checkpoint's model with the samples that choose, as `study`, and those that judge.

    Args:
        recipe: our engine's, resolved.
        folder: the checkpoint.
        device: where the model goes.
        texts: what to read.
        tokens: about how many judge.
        plan_tokens: about how many choose.

    Raises:
        ValueError: weights, a width or a text that cannot be used.
    """
    loaded = load(recipe, folder, device)
    modules = convertible(loaded.model, [])
    check_weights(modules)
    width = int(loaded.model.config.hidden_size)
    if width < 2 * RUN:
        raise ValueError(
            f"the model's {width} channels are fewer than two runs of {RUN}, which outliers come in; take a wider model."
        )
    positions = loaded.position_limit
    ways = partial(encode, loaded.tokenizer), partial(encode_continuation, loaded.tokenizer)
    window = min(positions, LONGEST_WINDOW)
    with quiet():  # upstream warns of texts beyond the positions, and this one is cut afterwards
        if texts.choose is None:
            study, judge = cut(texts.judge, *ways, max(tokens, plan_tokens), window, positions)
            study = _first(study, plan_tokens)
        else:
            judge = list(chain(*cut(texts.judge, *ways, -(-tokens // 2), window, positions)))
            study, _ = cut(texts.choose, *ways, plan_tokens, window, positions)
    return Subject(loaded.model, modules, study, judge, str(recipe.dtype))


def _first(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Returns samples up to the one that reaches a number of judged tokens."""
    taken, held = [], 0
    for sample in samples:
        if held < tokens:
            taken.append(sample)
            held += len(sample.token_ids)
    return taken


def measure_quality(subject: Subject) -> dict[str, Any]:
    """Returns the rows of all models and formats, and each model's plan.

    Args:
        subject: the model as trained, its weights left as they are.
    """
    before = likelihoods(subject.model, subject.judge)
    rows: list[dict[str, Any]] = []
    plans = {}
    for version in with_bar([TRAINED, *SHARES], "models"):
        changed = subject if version == TRAINED else _with_outliers(subject, version)
        kinds, plans[version] = _plan(changed)
        told = {name: _judge(changed, dict.fromkeys(changed.modules, kind)) for name, kind in FORMATS.items()}
        told |= {
            AWQ: _judge(_scaled(changed), dict.fromkeys(changed.modules, TRIAL)),
            PLAN: _judge(changed, kinds),
        }
        for name, after in told.items():
            stored = kinds if name == PLAN else dict.fromkeys(changed.modules, FORMATS.get(name, TRIAL))
            costs = point(changed.modules, stored, before, after)
            rows.append({"model": version, "weights": name, **costs, **_against(told[GROUPS], after)})
    for row in rows:
        row["change_percent"] = 100 * expm1(row["nll_change"])
    return {
        "rows": rows,
        "plans": plans,
        "recovered": {version: _recovered(rows, version) for version in plans},
    }


def outlier_channels(width: int, layout: str) -> int:
    """Returns how many of a norm's channels become outliers."""
    run = RUN if layout == RUNS else 1
    return max(1, width // SHARES[layout] // run) * run


def _with_outliers(subject: Subject, layout: str) -> Subject:
    model = copy.deepcopy(subject.model)
    add_outliers(model, outlier_channels(int(model.config.hidden_size), layout), FACTOR, layout=layout)
    return _of(subject, model)


def _of(subject: Subject, model: Any) -> Subject:
    return replace(subject, model=model, modules=convertible(model, []))


def _scaled(subject: Subject) -> Subject:
    """Returns a copy whose channels are scaled for what the choosing samples send through them."""
    model = copy.deepcopy(subject.model)
    window = min(WINDOW, int(model.config.max_position_embeddings))
    scale_for_quantization(model, calibration(subject.study, window, model.device), TRIAL)
    return _of(subject, model)


def calibration(samples: Sequence[Sample], window: int, device: torch.device) -> list[torch.Tensor]:
    """Returns samples one after the other as a few batches of windows, (batch, seq) int64; at most `WINDOWS` windows.

    Args:
        samples: prompts are read too.
        window: tokens of a window; fewer where the samples do not fill one.
        device: where the batches go.
    """
    ids = list(chain.from_iterable((*one.prompt_ids, *one.token_ids) for one in samples))
    window = min(window, len(ids))
    count = min(len(ids) // window, WINDOWS)
    windows = torch.tensor(ids[: count * window], device=device).view(count, window)
    return list(windows.chunk(CALIBRATION_BATCHES))


def _judge(subject: Subject, kinds: Mapping[str, WeightFormat | None]) -> list[Likelihood]:
    with stored_as(subject.modules, kinds):
        return likelihoods(subject.model, subject.judge)


def _plan(subject: Subject) -> tuple[dict[str, WeightFormat | None], dict[str, Any]]:
    """Returns each layer's format in the plan of `BUDGET`, and the plan, both chosen on the choosing samples."""
    before = likelihoods(subject.model, subject.study)
    rows = [
        measure_unit(subject.model, subject.modules, unit, TRIAL, subject.study, before)
        for unit in with_bar(units(subject.modules, MODULE), "modules")
    ]
    groups = planning.groups(rows)
    plan = planning.plan(groups, planning.choose(groups, BUDGET), format_fields(TRIAL))
    return planned_kinds(subject.modules, plan["modules"], TRIAL), plan


def _against(groups: Sequence[Likelihood], after: Sequence[Likelihood]) -> dict[str, float | None]:
    """Returns the change against INT4 in groups on the same model, with its standard error."""
    change, error = nll_change(groups, after)
    return {"nll_against_g128": change, "nll_against_g128_error": error}


def _recovered(rows: Sequence[Mapping[str, Any]], version: str) -> float | None:
    """Returns the share of the loss of INT4 in groups that the plan avoids; `None` where there is no loss."""
    change = {row["weights"]: row["nll_change"] for row in rows if row["model"] == version}
    return 1 - change[PLAN] / change[GROUPS] if change[GROUPS] > 0 else None
