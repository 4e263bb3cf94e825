"""Measures what storing some weights otherwise does: to the weights, to the layers' outputs, to the likelihood of a text.

Weights are packed and read back in place, and put back afterwards; so the model computes in its own dtype on just the numbers
that a packed layer stands for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from huggingface.transformers.generation.perplexity import Likelihood, continuation_likelihoods
from huggingface.transformers.integrations.quantized_linear import QuantizedWeight
from huggingface.transformers.quantizers.packing import WeightFormat
from models.precision_plan import PLAIN
from precision.calibration import Sample
from precision.planning import DEFAULT, INT8
from precision.units import Unit

PLAIN_BYTES = 2
"""Bytes of a number that is not quantised: half precision, whatever this study computes in."""


def outputs_first(module: Any) -> torch.Tensor:
    """Returns a linear layer's weight as (out, in), a view."""
    weight: torch.Tensor = module.weight.data
    return weight.t() if isinstance(module, Conv1D) else weight


def check_weights(modules: Mapping[str, Any]) -> None:
    """Raises ValueError if a linear layer's weight is not finite, or zero everywhere; the message names the layer."""
    for name, module in modules.items():
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"{name}: the weight holds NaN or infinite numbers; restore the checkpoint.")
        if not module.weight.any():
            raise ValueError(
                f"{name}: every weight is zero, so nothing can be measured; restore the checkpoint."
            )


def stored_bytes(module: Any, kind: WeightFormat | None) -> int:
    """Returns the bytes of a linear layer's weight in a format, scales included; `None` is half precision."""
    outputs, inner = outputs_first(module).shape
    if kind is None:
        return outputs * inner * PLAIN_BYTES
    return sum(
        math.prod(shape) * kind.dtypes[name].itemsize for name, shape in kind.shapes(outputs, inner).items()
    )


@contextmanager
def stored_as(
    modules: Mapping[str, Any], kinds: Mapping[str, WeightFormat | None]
) -> Iterator[dict[str, torch.Tensor]]:
    """Has linear layers compute on packed weights read back; yields their own weights, (out, in), and puts them back at the end.

    Args:
        modules: all linear layers, by full name.
        kinds: the format of those to change; `None` leaves one as it is.

    Raises:
        ValueError: a weight that cannot be packed; the message names the layer.
    """
    originals: dict[str, torch.Tensor] = {}
    try:
        for name, kind in kinds.items():
            if kind is not None:
                module, weight = modules[name], modules[name].weight.data
                back = _read_back(name, module, kind)
                originals[name] = weight
                module.weight.data = back
        yield {
            name: weight.t() if isinstance(modules[name], Conv1D) else weight
            for name, weight in originals.items()
        }
    finally:
        for name, weight in originals.items():
            modules[name].weight.data = weight


def _read_back(name: str, module: Any, kind: WeightFormat) -> torch.Tensor:
    try:
        back = QuantizedWeight.of(outputs_first(module), kind).dense(module.weight.dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return back.t().contiguous() if isinstance(module, Conv1D) else back


def likelihoods(model: Any, samples: Sequence[Sample]) -> list[Likelihood]:
    """Returns how likely a model finds each sample's judged tokens.

    Raises:
        ValueError: a sum is not finite.
    """
    told = continuation_likelihoods(model, [(one.prompt_ids, one.token_ids) for one in samples])
    if not all(math.isfinite(one.nll) for one in told):
        raise ValueError(f"the perplexity is not finite in {model.dtype}; use --dtype bfloat16 or float32.")
    return told


def nll_change(before: Sequence[Likelihood], after: Sequence[Likelihood]) -> tuple[float, float | None]:
    """Returns the change of the mean negative log-likelihood a token, and its standard error over samples.

    Args:
        before: of the samples, with the weights as they are.
        after: of the same samples; the error is `None` where there is one alone.
    """
    tokens, count = sum(one.tokens for one in before), len(before)
    changes = [new.nll - old.nll for old, new in zip(before, after, strict=True)]
    mean = sum(changes) / tokens
    if count < 2:
        return mean, None
    rest = sum((change - mean * old.tokens) ** 2 for change, old in zip(changes, before, strict=True))
    return mean, math.sqrt(rest * count / (count - 1)) / tokens


class OutputCosines:
    """Compares outputs of changed linear layers with what their own weights would give, on the inputs they get.

    Args:
        modules: all linear layers, by full name.
        originals: the own weights, (out, in), of those that were changed.
    """

    def __init__(self, modules: Mapping[str, Any], originals: Mapping[str, torch.Tensor]) -> None:
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in originals}
        self._rows = dict.fromkeys(originals, 0)
        self._handles = [
            modules[name].register_forward_hook(self._hook(name, weight))
            for name, weight in originals.items()
        ]

    def _hook(self, name: str, weight: torch.Tensor) -> Any:
        def compare(module: Any, inputs: Any, output: torch.Tensor) -> None:
            own = F.linear(inputs[0], weight, module.bias)
            cosines = F.cosine_similarity(output.float(), own.float(), dim=-1)
            self._sums[name] += cosines.double().sum().cpu()
            self._rows[name] += cosines.numel()

        return compare

    def __enter__(self) -> OutputCosines:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def mean(self) -> float | None:
        """The mean over layers of the mean over rows; `None` where no row has passed."""
        means = [float(self._sums[name]) / rows for name, rows in self._rows.items() if rows]
        return sum(means) / len(means) if means else None


@torch.no_grad()
def measure_unit(
    model: Any,
    modules: Mapping[str, Any],
    unit: Unit,
    trial: WeightFormat,
    samples: Sequence[Sample],
    before: Sequence[Likelihood],
) -> dict[str, Any]:
    """Returns what quantising one unit alone does, as a line of `units.jsonl`.

    Args:
        model: a causal language model.
        modules: its linear layers, by full name.
        unit: those to quantise.
        trial: the format.
        samples: the calibration text.
        before: its likelihoods with the weights as they are.

    Raises:
        ValueError: a weight that cannot be packed, or likelihoods that are not finite.
    """
    with stored_as(modules, dict.fromkeys(unit.modules, trial)) as originals:
        errors = _weight_errors(modules, originals)
        with OutputCosines(modules, originals) as cosines:
            change, spread = nll_change(before, likelihoods(model, samples))
    int8 = None
    if trial.bits != 8:
        with stored_as(modules, dict.fromkeys(unit.modules, WeightFormat(8))):
            int8, _ = nll_change(before, likelihoods(model, samples))
    formats = {DEFAULT: trial, INT8: WeightFormat(8), PLAIN: None}
    return {
        "unit": unit.name,
        "layer": unit.layer,
        "part": unit.part,
        "modules": list(unit.modules),
        "weights": sum(modules[name].weight.numel() for name in unit.modules),
        "bytes": {
            key: sum(stored_bytes(modules[name], kind) for name in unit.modules)
            for key, kind in formats.items()
        },
        **errors,
        "output_cosine": cosines.mean,
        "nll_change": change,
        "nll_change_error": spread,
        "perplexity_ratio": math.exp(change),
        "int8_nll_change": int8,
    }


def _weight_errors(modules: Mapping[str, Any], originals: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns the mean squared error of changed weights, and the same over their mean square."""
    squares = total = count = 0.0
    for name, own in originals.items():
        error = outputs_first(modules[name]).double() - own.double()
        squares += float(error.square().sum())
        total += float(own.double().square().sum())
        count += own.numel()
    return {"weight_mse": squares / count, "weight_relative_mse": squares / total}
