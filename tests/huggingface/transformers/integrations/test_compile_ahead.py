"""Walking through work without doing it: what is asked for, what is left alone, and what happens where it cannot be done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from huggingface.transformers.integrations import compile_ahead as module
from huggingface.transformers.integrations.compile_ahead import LIKE, compile_ahead
from huggingface.transformers.integrations.triton_support import triton

CUDA = torch.device("cuda")
ASYNC = pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="this Triton has no such mode")


KERNELS = {
    "_add_norm_kernel", "_linear_kernel", "accept_kernel", "best_tokens_kernel", "chain_level_kernel", "chain_selection_kernel",
    "commit_kernel", "draft_level_kernel", "draft_selection_kernel", "fragment_linear_kernel", "tree_attention_kernel",
}  # fmt: skip


def operations(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    """Returns what operations like those of a step make of (4, 8) rows and (8, 8) weights; writes to (4, 8) `out`."""
    at = torch.zeros(4, 1, dtype=torch.int64)
    made = [
        torch.nn.functional.linear(rows, weight),
        torch._addmm_activation(weight[0], rows, weight.t(), use_gelu=True),
        torch.cat([rows, rows], 1),
        rows[torch.tensor([1, 2])],
        rows.gather(1, at),
        rows.view(8, 4)[:2].contiguous(),
        (rows + 1).clamp(max=3).to(torch.bfloat16),
        torch.isfinite(rows).all(dim=1),
        torch.multinomial(rows.softmax(-1), 1),
        torch.where(rows > 0, rows, 0.0),
        *rows.topk(3),
        *rows.sort(dim=1),
    ]
    out.copy_(rows)
    out.add_(1.0)[:, :1] = rows[:, 1:2]
    out.scatter_(1, at, 1.0)
    torch.add(rows, rows, out=out)
    return [*made, out.fill_(3.0)]


def test_results_have_their_sizes_and_nothing_is_written():
    rows, weight = torch.randn(4, 8), torch.randn(8, 8)
    expected = operations(rows, weight, torch.zeros(4, 8))
    out, drawn = torch.zeros(4, 8), torch.get_rng_state()
    with torch.inference_mode(), module._Undone():
        found = operations(rows, weight, out)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    assert found[-1] is out
    assert not out.any()
    assert torch.equal(torch.get_rng_state(), drawn)


def test_views_and_new_tensors_are_real():
    """The latter may be kept: a counter that is made during the walk must be zero afterwards."""
    rows = torch.arange(8.0).view(2, 4)
    with module._Undone():
        assert rows[1].data_ptr() == rows.data_ptr() + 16
        made = torch.zeros(4), torch.zeros_like(rows), rows.new_full((2,), 5.0), torch.arange(3)
    assert [one.sum().item() for one in made] == [0, 0, 10, 3]
    assert all(hasattr(torch.ops.aten, name) for name in LIKE)


@pytest.mark.skipif(triton is None, reason="no Triton")
def test_only_this_threads_launches_are_left_out(monkeypatch):
    asked = []
    kind = SimpleNamespace(run=lambda kernel, *args, grid, warmup: asked.append((kernel, grid, warmup)))
    monkeypatch.setattr(module.triton.runtime, "JITFunction", kind)
    launch = kind.run
    with pytest.raises(RuntimeError, match="stop"), module._no_launches():
        kind.run("here", grid=(1,), warmup=False)
        other = threading.Thread(target=lambda: kind.run("elsewhere", grid=(2,), warmup=False))
        other.start()
        other.join()
        raise RuntimeError("stop")
    assert asked == [("here", (1,), True), ("elsewhere", (2,), False)]
    assert kind.run is launch


@pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="this Triton compiles one kernel after another"
)
@ASYNC
def test_work_that_cannot_be_walked_through_is_told_and_left_to_itself(monkeypatch, caplog):
    monkeypatch.setattr(module, "interpreting", lambda: False)
    done = []

    def works():
        done.append(1)
        raise NotImplementedError("no meta kernel")

    with caplog.at_level("WARNING"):
        monkeypatch.setattr(module.logger, "propagate", True)
        compile_ahead(CUDA, [works])
    assert done == [1]
    assert "one after another" in caplog.text
    assert torch.ones(1).add(1).item() == 2  # the modes are off again


@ASYNC
def test_an_interrupt_while_kernels_are_waited_for_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(module, "interpreting", lambda: False)
    mode = triton.runtime._async_compile.active_mode

    def interrupt():
        raise KeyboardInterrupt

    def works():
        mode.get().submit("key", lambda: "compiled", lambda kernel: interrupt())

    with pytest.raises(KeyboardInterrupt):
        compile_ahead(CUDA, [works])
    assert mode.get() is None
    walked = []
    compile_ahead(CUDA, [lambda: walked.append(mode.get() is not None)])
    assert walked == [True]


@ASYNC
def test_memory_that_does_not_suffice_is_not_told_as_anything_else(monkeypatch):
    monkeypatch.setattr(module, "interpreting", lambda: False)

    def works():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_ahead(CUDA, [works])


@ASYNC
def test_two_threads_walk_one_after_the_other(monkeypatch):
    """Each puts back what it found."""
    monkeypatch.setattr(module, "interpreting", lambda: False)
    launch, met, walking = triton.runtime.JITFunction.run, [], []
    entered = threading.Event()

    def works():
        walking.append(1)
        entered.set()
        time.sleep(0.05)
        met.append(len(walking))
        walking.pop()

    threads = [threading.Thread(target=compile_ahead, args=(CUDA, [works])) for _ in range(2)]
    for thread in threads:
        thread.start()
        entered.wait()
    for thread in threads:
        thread.join()
    assert met == [1, 1]
    assert triton.runtime.JITFunction.run is launch


@pytest.mark.parametrize(
    "operation",
    [
        lambda rows: rows.unsqueeze_(0),
        lambda rows: rows.resize_(3),
        lambda rows: torch.add(rows, 1, out=torch.empty(0)),
        lambda rows: torch.ops.aten._native_batch_norm_legit(
            rows, None, None, rows[0], rows[0] + 1, True, 0.1, 1e-5
        ),
    ],
)
def test_what_cannot_be_left_undone_says_so(operation):
    with pytest.raises(NotImplementedError, match="not known here"), module._Undone():
        operation(torch.zeros(4, 8))


def test_nothing_is_drawn():
    state = torch.get_rng_state()
    with module._Undone():
        assert torch.rand(3).shape == torch.randint(5, (3,)).shape == torch.rand_like(torch.zeros(3)).shape
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_walked_through_on_a_cpu():
    compile_ahead(torch.device("cpu"), [lambda: pytest.fail("walked")])


@pytest.mark.skipif(
    not hasattr(triton, "AsyncCompileMode"), reason="this Triton compiles one kernel after another"
)
def test_a_walk_compiles_what_the_steps_launch(tmp_path):
    """For a GPU that is not there; a second walk finds every kernel compiled, so a launch will."""
    root = Path(module.__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("walked_step.py")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["asked"]) >= KERNELS
    assert (told["again"], told["touched"]) == (0, False)
