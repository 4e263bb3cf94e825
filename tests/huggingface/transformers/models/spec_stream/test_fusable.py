"""What the fused kernels do not know of a model is a reason not to be fused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from huggingface.transformers.integrations.packed_linear import PACKED
from huggingface.transformers.models.spec_stream.fusable import unfused_reason
from tests.architectures import SMALL_HEAD, with_heads_of


@pytest.fixture
def fresh(make_model):
    """Returns `fresh(architecture, **fields)`: a model of one's own."""
    return lambda *args, **fields: copy.deepcopy(make_model(*args, **fields))


@pytest.fixture
def known(fresh):
    """Returns `known(architecture, **fields)`: a model with heads of a size that the kernels know."""

    def make(architecture, **fields):
        return fresh(architecture, **with_heads_of(architecture, 16), **fields)

    return make


def test_known_models_are_fused(architecture, known):
    assert unfused_reason(known(architecture)) is None


def test_an_unknown_activation_is_a_reason(known):
    assert "'relu'" in unfused_reason(known("gpt_neo", activation_function="relu"))
    assert "'gelu'" in unfused_reason(known("llama", hidden_act="gelu"))


def test_an_unknown_head_size_is_a_reason(architecture, fresh):
    assert f"heads of {SMALL_HEAD[architecture]} features" in unfused_reason(fresh(architecture))


def test_an_architecture_without_names_is_a_reason(architecture, known):
    model = known(architecture)
    model.layer_names = None
    assert "does not say where" in unfused_reason(model)


class _Quantised(nn.Linear):
    """Stands for what a quantisation library puts in a linear layer's place."""


@pytest.mark.parametrize("index", [0, 3])
def test_a_replaced_linear_is_a_reason(architecture, index, known):
    """In any layer: quantisation often leaves out the first."""
    model = known(architecture)
    names = model.layer_names
    for name in (*names.projections, names.output, *names.expand, names.contract):
        linear = model.decoder_layers()[index].get_submodule(name)
        kind, linear.__class__ = type(linear), _Quantised
        assert f"{name} is a _Quantised" in (unfused_reason(model) or "")
        linear.__class__ = kind


class _Wrapper(nn.Module):
    """Passes on what it is asked for, as a compiled layer does."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._orig_mod = layer

    def __getattr__(self, name):
        return getattr(self._modules["_orig_mod"], name) if name != "_orig_mod" else super().__getattr__(name)


def test_parts_of_a_wrapped_layer_are_found(architecture, known):
    model = known(architecture)
    layers = model.decoder_layers()
    layers[1] = _Wrapper(layers[1])
    assert unfused_reason(model) is None
    layers[1].get_submodule(model.layer_names.output).__class__ = _Quantised
    assert f"{model.layer_names.output} is a _Quantised" in (unfused_reason(model) or "")


def test_a_model_that_has_run_on_a_cpu_is_fused(architecture, known):
    """There its linears are packed, in place; on a GPU a packed linear is a plain one."""
    model = known(architecture)
    for module in model.modules():
        module.__class__ = PACKED.get(type(module), type(module))
    assert unfused_reason(model) is None


@pytest.mark.parametrize("index", [0, 3])
def test_an_unknown_norm_is_a_reason(architecture, index, known):
    model = known(architecture)
    *path, last = model.layer_names.mlp_norm.split(".")
    setattr(model.decoder_layers()[index].get_submodule(".".join(path)), last, nn.Identity())
    assert "the norm Identity" in (unfused_reason(model) or "")


def test_a_gated_mlp_with_bias_is_a_reason(known):
    assert "gated MLP with a bias" in unfused_reason(known("llama", mlp_bias=True))


def test_rotary_embeddings_that_ask_the_host_are_a_reason(make_model):
    model = copy.deepcopy(make_model("llama"))
    assert "dynamic" not in str(unfused_reason(model))
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    assert "dynamic" in str(unfused_reason(model))


class _Negating(nn.Linear):
    """A head with a mind of its own, as adapters make them."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return -super().forward(rows)


def test_an_unknown_head_or_last_norm_is_a_reason(architecture, known):
    model = known(architecture)
    head = model.get_output_embeddings()
    kind, head.__class__ = type(head), _Negating
    assert "the LM head is a _Negating" in (unfused_reason(model) or "")
    head.__class__ = kind
    model.last_norm = nn.Identity
    assert "the norm Identity" in (unfused_reason(model) or "")
