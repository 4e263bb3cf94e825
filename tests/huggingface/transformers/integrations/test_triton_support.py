"""Where kernels run, why they do not, and that nothing needs them to be there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from huggingface.transformers.integrations import triton_support
from huggingface.transformers.integrations.triton_support import interpreting, overlaps_launches, unavailable

ROOT = Path(__file__).parents[4]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import huggingface.transformers
from huggingface.transformers.generation import fused_step, graph_runner
from huggingface.transformers.integrations import (
    context_lookup, fused_norm, gemv, quantized_linear, rotary, skinny_linear, tree_acceptance, tree_attention, tree_drafting,
)
from huggingface.transformers.integrations.triton_support import unavailable

assert unavailable(torch.device("cuda")) == "Triton is not installed"
norm = torch.nn.LayerNorm(8)
rows, weight = torch.randn(1, 2, 8), torch.randn(6, 8)
got = skinny_linear.linear(rows, weight, activation="silu", norm=norm)
assert torch.equal(got, torch.nn.functional.silu(norm(rows) @ weight.T)), "linear"
assert torch.equal(fused_norm.add_norm(rows, rows, norm)[0], norm(rows + rows)), "add_norm"
cache = torch.zeros(1, 1, 4, 4)
step = tree_attention.StepRows(2)
attended = tree_attention.tree_attention(torch.randn(1, 2, 12), cache, cache.clone(), torch.tensor([0]), step, 0.5)
assert attended.shape == (1, 2, 4), "attention"
assert tree_acceptance.best_tokens(torch.tensor([[[1.0, 3.0, 3.0]]])).tolist() == [[1]], "best_tokens"
tree = tree_drafting.TreeTensors.allocate(1, 3)
tree_drafting.draft_tree(torch.randn(1, 2, 5), torch.tensor([1]), None, None, tree, beam=2)
found = torch.zeros(1, 1, dtype=torch.int64)
context_lookup.lookup_continuation(torch.tensor([[1, 2, 3, 1]]), torch.tensor([4]), torch.tensor([2]), found)
assert found.tolist() == [[3]], "lookup"
"""


def test_everything_imports_and_computes_without_triton():
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr


def test_without_triton_a_kernel_is_a_plain_function(monkeypatch):
    monkeypatch.setattr(triton_support, "triton", None)

    def kernel():
        """Stands for one."""

    assert triton_support.jit(kernel) is kernel
    assert unavailable(CPU) == unavailable(CUDA) == "Triton is not installed"
    assert not interpreting()


@pytest.mark.skipif(triton_support.triton is None, reason="no Triton")
class TestWithTriton:
    @pytest.mark.parametrize("setting, expected", [("1", True), ("0", False), (None, False)])
    def test_the_interpreter_stands_in_for_a_gpu(self, setting, expected, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        if setting is not None:
            monkeypatch.setenv("TRITON_INTERPRET", setting)
        assert interpreting() is expected
        assert (unavailable(CPU) is None) is expected

    def test_a_cpu_is_named(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        assert unavailable(CPU) == "Triton kernels need CUDA, not cpu"

    @pytest.mark.parametrize(
        "capability, reason", [((7, 5), "capability 7.5"), ((8, 0), None), ((9, 0), None), ((12, 0), None)]
    )
    def test_an_old_gpu_is_named(self, capability, reason, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        found = unavailable(CUDA)
        assert found is None if reason is None else reason in (found or "")

    @pytest.mark.parametrize(
        "capability, overlaps", [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)]
    )
    def test_launches_overlap_from_hopper_on(self, capability, overlaps, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert overlaps_launches(CUDA) is overlaps
        assert not overlaps_launches(CPU)
