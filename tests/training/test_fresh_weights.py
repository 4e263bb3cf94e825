"""A model without scaled scores, trained with shrunk and slowed queries, goes the way of one that scales."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from training.fresh_weights import query_weights, shrink_queries, slow_queries

HEAD = 16


class Attention(nn.Module):
    """One head with a residual; its scores are multiplied by `scaling`."""

    def __init__(self, scaling: float):
        super().__init__()
        self.scaling = scaling
        self.query, self.key, self.value = (nn.Linear(8, HEAD, bias=False) for _ in range(3))
        self.out = nn.Linear(HEAD, 8, bias=False)

    def forward(self, rows):
        scores = self.query(rows) @ self.key(rows).transpose(-1, -2) * self.scaling
        return rows + self.out(scores.softmax(-1) @ self.value(rows))


class Names:
    projections = ("query", "key", "value")


class Model(nn.Module):
    layer_names = Names

    def __init__(self, scaling: float):
        super().__init__()
        self.layers = nn.ModuleList([Attention(scaling), Attention(scaling)])

    def decoder_layers(self):
        return self.layers

    def head_size(self):
        return HEAD

    def attention_scaling(self):
        return self.layers[0].scaling

    def forward(self, rows):
        for layer in self.layers:
            rows = layer(rows)
        return rows


def pair() -> tuple[Model, Model]:
    """Returns a model that scales and one of the same weights that does not."""
    torch.manual_seed(0)
    scaled, plain = Model(HEAD**-0.5).double(), Model(1.0).double()
    plain.load_state_dict(scaled.state_dict())
    return scaled, plain


def groups(model: Model) -> list[dict]:
    matrices = list(model.parameters())
    return [
        {"params": matrices[:5], "lr": 0.01, "weight_decay": 0.1},
        {"params": matrices[5:], "lr": 0.01, "weight_decay": 0.0},
    ]


def train(model: Model, optimizer: torch.optim.Optimizer) -> list[float]:
    torch.manual_seed(1)
    rows, target = torch.randn(4, 6, 8).double(), torch.randn(4, 6, 8).double()
    losses = []
    for _ in range(30):
        loss = (model(rows) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_way_of_a_model_that_scales():
    scaled, plain = pair()
    untouched = copy.deepcopy(plain)
    expected = train(scaled, torch.optim.AdamW(groups(scaled), eps=1e-30))
    shrink_queries(plain)
    losses = train(plain, torch.optim.AdamW(slow_queries(groups(plain), plain), eps=1e-30))
    assert losses == pytest.approx(expected, rel=1e-6)
    other = train(untouched, torch.optim.AdamW(groups(untouched), eps=1e-30))
    assert other[-1] != pytest.approx(expected[-1], rel=1e-3)


def test_a_model_that_scales_stays_as_it_is():
    scaled, _ = pair()
    before = copy.deepcopy(scaled.state_dict())
    given = groups(scaled)
    shrink_queries(scaled)
    assert slow_queries(given, scaled) is given
    assert all(torch.equal(before[name], weight) for name, weight in scaled.state_dict().items())


def test_every_parameter_stays_in_one_group():
    _, plain = pair()
    split = slow_queries(groups(plain), plain)
    held = [id(weight) for group in split for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in plain.parameters())
    slow = {id(weight) for group in split if group["lr"] < 0.01 for weight in group["params"]}
    assert slow == {id(weight) for weight in query_weights(plain)}


def test_a_model_that_names_no_layers_is_left_alone():
    _, plain = pair()
    plain.layer_names = None
    assert query_weights(plain) == []
    given = groups(plain)
    assert slow_queries(given, plain) is given
