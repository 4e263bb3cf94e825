"""Captured decoding without a GPU: the runner, the step and the host's side are the real ones, a graph is a plain call.

Replaying a graph does again what was done while it was captured; on a CPU a function does the same. What remains untested is what
only a GPU has: streams, events, and the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from huggingface.transformers.generation import decode_run, graph_runner
from huggingface.transformers.generation.graph_runner import GraphRunner, _Outlet
from huggingface.transformers.integrations import tree_attention
from huggingface.transformers.integrations.tree_attention import StepRows


class HostRunner(GraphRunner):
    """A runner whose graphs are calls; `replays` counts those of the step."""

    replays = 0

    def _pinned(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def _outlet(self, source: torch.Tensor) -> _Outlet:
        return _Outlet(self._pinned(*source.shape), SimpleNamespace(synchronize=lambda: None))

    def _capture(self, work: Callable[[], None]) -> Any:
        work()  # as a real capture does: what it leaves in the buffers must not matter
        return SimpleNamespace(replay=work)

    def _publish(self, source: torch.Tensor, outlet: _Outlet) -> None:
        self.replays += source is self.step_buffers.packed
        outlet.tokens.copy_(source)


def _remembered() -> Callable:
    """Returns the attention reference's function of who sees whom, which remembers: layers and sequences ask the same again."""
    original, known = tree_attention._positions_and_visibility, {}

    def positions_and_visibility(rows: StepRows, b: int):
        parts = (rows.ancestors, rows.depths, rows.anchors)
        key = (
            rows.nodes,
            rows.streams,
            rows.carriers,
            *(str(part[b].tolist()) if part is not None else "" for part in parts),
        )
        if key not in known:
            known[key] = original(rows, b)
        positions, visible = known[key]
        return positions.clone(), visible.clone()

    return positions_and_visibility


def use_host_runner(monkeypatch, interpret: bool = False) -> None:
    """Makes `generate` take the captured path on a CPU, on the plain references or on the interpreted kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpret)))
    monkeypatch.setattr(tree_attention, "_positions_and_visibility", _remembered())
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(graph_runner, "GraphRunner", HostRunner)
    monkeypatch.setattr(decode_run, "uncaptured_reason", lambda *args: None)
