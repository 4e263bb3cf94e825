"""Muon against upstream's, the division among processes, and what happens to everything else."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from training.muon import MUON_KEY, MuonAdamW, layer_matrices, muon_groups, orthogonal
from training.optimiser import MasterAdamW

SHAPES = ((24, 16), (24, 16), (16, 40), (24, 16), (16, 16))
RATE, DECAY = 0.02, 0.1


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(*shape)) for shape in SHAPES] + [nn.Parameter(torch.randn(7))]


def groups(given: list[nn.Parameter]) -> list[dict[str, Any]]:
    shared = {"lr": RATE, "weight_decay": DECAY}
    return [{"params": given[:-1], MUON_KEY: True, **shared}, {"params": given[-1:], **shared}]


def run(optimizer: torch.optim.Optimizer, given: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for number, weight in enumerate(given):
            torch.manual_seed(100 * step + number)
            weight.grad = torch.randn(weight.shape).to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("shape", [(3, 24, 16), (2, 16, 40), (1, 16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    torch.manual_seed(0)
    given = torch.randn(shape)
    result = orthogonal(given).float()
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    along = torch.diagonal(left.mT @ result @ right.mT, dim1=1, dim2=2)
    large = values > 0.1 * values.amax(1, keepdim=True)
    assert ((along > 0.6) & (along < 1.3))[large].all()


def test_matrices_go_the_way_of_upstreams_muon():
    ours, theirs = weights(), weights()
    run(MuonAdamW(groups(ours)), ours, range(5))
    options = {"lr": RATE, "weight_decay": DECAY, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    run(torch.optim.Muon(theirs[:-1], **options), theirs, range(5))
    run(torch.optim.AdamW(theirs[-1:], lr=RATE, weight_decay=DECAY), theirs, range(5))
    start = weights()
    for mine, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert moved > 0
        assert (mine - other).norm() < 0.02 * moved  # bfloat16 products in another order


def test_without_marked_groups_it_is_adamw():
    ours, theirs = weights(), weights()
    run(MuonAdamW(ours, lr=RATE), ours, range(3))
    run(torch.optim.AdamW(theirs, lr=RATE), theirs, range(3))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [MuonAdamW, MasterAdamW])
def test_a_saved_state_continues_exactly(kind, tmp_path):
    whole, cut, resumed = weights(), weights(), weights()
    run(kind(groups(whole)), whole, range(6))
    first = kind(groups(cut))
    run(first, cut, range(3))
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = kind(groups(resumed))
    for mine, other in zip(resumed, cut, strict=True):
        mine.data.copy_(other.data)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    run(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def share_out(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=processes, timeout=timedelta(seconds=60)
    )
    given = weights()
    run(MuonAdamW(groups(given)), given, range(4))
    torch.save(given, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_matrices_out_and_end_alike(tmp_path):
    alone = weights()
    run(MuonAdamW(groups(alone)), alone, range(4))
    mp.spawn(share_out, (2, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for first, second, expected in zip(*results, alone, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, rtol=0, atol=2e-3)


class Names:
    projections = ("query", "key", "value")
    output, expand, contract = "out", ("up",), "down"


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value", "out", "up", "down"):
            self.add_module(name, nn.Linear(4, 4))


class Model(nn.Module):
    layer_names: Any = Names

    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Embedding(9, 4), nn.ModuleList([Layer(), Layer()])

    def decoder_layers(self):
        return self.layers


def test_only_the_layers_matrices_are_marked():
    model = Model()
    split = muon_groups([{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0}], model, 0.5)
    marked = {id(weight) for group in split if group.get(MUON_KEY) for weight in group["params"]}
    assert marked == {id(weight) for weight in layer_matrices(model)}
    assert len(marked) == 12
    assert {group["lr"] for group in split} == {0.1, 0.5}
    assert sum(len(group["params"]) for group in split) == len(list(model.parameters()))


def test_a_model_that_names_no_layers_is_refused():
    model = Model()
    model.layer_names = None
    with pytest.raises(ValueError, match="--optimizer adamw"):
        layer_matrices(model)
