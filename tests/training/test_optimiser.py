from __future__ import annotations

import torch
from torch import nn

from training.optimiser import MasterAdamW

LEARNING_RATE = 1e-4  # below 1/256 of a weight of 1: lost without float32 copies


def optimiser(weights: list[nn.Parameter], **options) -> MasterAdamW:
    return MasterAdamW(torch.optim.AdamW(weights, lr=LEARNING_RATE, **options).param_groups)


def weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))]


def run(optimizer, given: list[nn.Parameter], steps: int) -> None:
    for step in range(steps):
        for number, weight in enumerate(given[:2]):  # the third never gets a gradient
            values = torch.sin(torch.arange(weight.numel()) + step + number).view_as(weight)
            weight.grad = values.bfloat16().to(weight.dtype)
        optimizer.step()
        optimizer.zero_grad()


def test_updates_are_those_of_adamw_in_float32():
    plain, ours = weights(), weights()
    master = optimiser(ours, weight_decay=0.1)
    run(torch.optim.AdamW(plain, lr=LEARNING_RATE, weight_decay=0.1), plain, 20)
    run(master, ours, 20)
    assert all(weight.dtype == torch.bfloat16 for weight in ours)
    for expected, weight in zip(plain, ours, strict=True):
        assert torch.equal(weight, expected.bfloat16())
    master.release()
    for expected, weight in zip(plain, ours, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=0)


def test_small_updates_are_not_lost():
    ours = weights()
    master = optimiser(ours, weight_decay=0.0)
    for _ in range(100):
        ours[1].grad = torch.ones(4, dtype=torch.bfloat16)
        master.step()
    assert torch.allclose(ours[1].float(), torch.full((4,), 0.99), atol=2**-8)


def test_gradients_are_cleared():
    ours = weights()
    master = optimiser(ours)
    ours[0].grad = torch.ones_like(ours[0])
    master.zero_grad(set_to_none=False)
    assert not ours[0].grad.any()
    master.zero_grad()
    assert ours[0].grad is None


def test_a_saved_state_continues_exactly():
    whole, cut, resumed = weights(), weights(), weights()
    run(optimiser(whole), whole, 6)
    first = optimiser(cut)
    run(first, cut, 3)
    second = optimiser(resumed)
    second.load_state_dict(first.state_dict())
    assert torch.equal(resumed[0], cut[0])
    for step in range(3, 6):
        for number, weight in enumerate(resumed[:2]):
            weight.grad = torch.sin(torch.arange(weight.numel()) + step + number).view_as(weight).bfloat16()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
