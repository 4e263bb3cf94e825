"""Which graphs a call needs, which of those there are serve it, and why there are none."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)
from transformers.generation.logits_process import EtaLogitsWarper

from huggingface.transformers.generation import graph_runner
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.graph_runner import (
    KEPT,
    LARGEST_TREE,
    SMALLEST_CAPACITY,
    SMALLEST_PROMPT,
    Geometry,
    geometry_of,
    release_runners,
    runner_for,
    uncaptured_reason,
)
from huggingface.transformers.generation.step_record import PhaseTimer
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.generation.verification import SCORE_ONLY, Rule
from tests.architectures import with_heads_of

from .host_runner import HostRunner, use_host_runner

GREEDY = Rule(LogitsProcessorList())
TREE = DraftPlan(TreeShape((-1, 0, 0, 1), 2), beam=8)


@pytest.fixture
def make_known(make_model):
    """Returns `make_known(architecture, **fields)`: a model of one's own with heads of a size that the kernels know."""

    def make(architecture, **fields):
        heads = with_heads_of(architecture, 16)
        return copy.deepcopy(make_model(architecture, torch.float32, **heads, **fields))

    return make


class _OnCuda:
    """A model as it would be on a GPU that the kernels know."""

    def __init__(self, model, device="cuda"):
        self.model, self.device = model, torch.device(device)

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.fixture
def on_cuda(make_known, architecture, monkeypatch):
    monkeypatch.setattr(graph_runner.triton_support, "unavailable", lambda device: None)
    return _OnCuda(make_known(architecture))


def test_a_known_model_is_captured(on_cuda):
    assert uncaptured_reason(on_cuda, TREE, GREEDY) is None
    assert uncaptured_reason(on_cuda, DraftPlan.plain(), GREEDY) is None


def test_graphs_are_cudas(architecture, make_known):
    assert "the model is on cpu" in uncaptured_reason(make_known(architecture), TREE, GREEDY)


def test_what_the_kernels_miss_is_the_reason(on_cuda, monkeypatch):
    monkeypatch.setattr(graph_runner.triton_support, "unavailable", lambda device: "no compiler")
    assert uncaptured_reason(on_cuda, TREE, GREEDY) == "no compiler"


def test_what_the_layers_miss_is_the_reason(on_cuda):
    on_cuda.model.layer_names = None
    assert "does not say where" in uncaptured_reason(on_cuda, TREE, GREEDY)


def test_a_dtype_that_no_kernel_computes_in_is_a_reason(on_cuda):
    on_cuda.model.double()
    assert "no kernel knows torch.float64" in uncaptured_reason(on_cuda, TREE, GREEDY)


def test_autocast_is_a_reason(on_cuda, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    assert "autocast is on" in uncaptured_reason(on_cuda, TREE, GREEDY)


def test_a_processor_that_asks_the_device_is_a_reason(on_cuda):
    rule = Rule(LogitsProcessorList([EtaLogitsWarper(1e-3)]), do_sample=True)
    assert "eta_cutoff" in uncaptured_reason(on_cuda, TREE, rule)


@pytest.mark.parametrize("kind", [kind for kind in SCORE_ONLY if kind is not EtaLogitsWarper])
def test_the_others_ask_it_nothing(kind):
    """What reads a number back from the device cannot be captured."""
    options = {
        "TemperatureLogitsWarper": [0.7], "TopKLogitsWarper": [3], "TopPLogitsWarper": [0.8], "MinPLogitsWarper": [0.1],
        "TypicalLogitsWarper": [0.8], "EpsilonLogitsWarper": [1e-3],
    }  # fmt: skip
    processor = kind(*options.get(kind.__name__, []))
    with _NothingRead():
        processor(None, torch.randn(3, 13))
    with pytest.raises(AssertionError, match="reads"), _NothingRead():
        EtaLogitsWarper(1e-3)(None, torch.randn(3, 13))


class _NothingRead(TorchDispatchMode):
    """Fails where a number of a tensor is read."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "reads a number"
        return function(*args, **(kwargs or {}))


def test_processors_of_prefixes_are_a_reason(on_cuda):
    rule = Rule(LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)]))
    assert "tokens before" in uncaptured_reason(on_cuda, TREE, rule)
    rule = Rule(LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(3)]), do_sample=True)
    assert uncaptured_reason(on_cuda, TREE, rule) is None


@pytest.mark.parametrize("nodes, captured", [(LARGEST_TREE, True), (LARGEST_TREE + 1, False)])
def test_too_many_nodes_are_a_reason(on_cuda, nodes, captured):
    plan = DraftPlan(TreeShape((-1, *[0] * (nodes - 1)), 2), beam=8)
    reason = uncaptured_reason(on_cuda, plan, GREEDY)
    assert reason is None if captured else str(nodes) in reason


def test_a_fixed_tree_is_a_reason(on_cuda):
    assert "fixed tree" in uncaptured_reason(on_cuda, replace(TREE, beam=None), GREEDY)


def model_of(limit: int, number: int = 0):
    """Returns what of a model decides a geometry: its positions, and the number of its state."""
    return SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=limit),
        _model_state=SimpleNamespace(holds=lambda: True, number=number, writes=lambda: 0),
    )


def geometry(model=None, batch=1, longest=10, room=20, plan=TREE, rule=GREEDY, phases=False) -> Geometry:
    return geometry_of(model or model_of(2048), batch, longest, room, plan, rule, phases)


@pytest.mark.parametrize(
    "longest", [1, 2, SMALLEST_PROMPT - 1, SMALLEST_PROMPT, SMALLEST_PROMPT + 1, 300, 2000]
)
@pytest.mark.parametrize("room", [1, 200, 5000])
def test_sizes_suffice_and_are_few(longest, room):
    """Room for what the call needs; at most twice as much, so that calls share their graphs."""
    made = geometry(longest=longest, room=room)
    assert longest <= made.longest_prompt <= max(SMALLEST_PROMPT, 2 * longest)
    needed = min(longest + room, 2048)
    assert needed <= made.capacity <= max(SMALLEST_CAPACITY, 2 * needed)
    for size in (made.longest_prompt, made.capacity):
        assert size & (size - 1) == 0


@pytest.mark.parametrize("limit", [1000, 2048])
def test_no_prompt_is_longer_than_the_positions(limit):
    assert geometry(model_of(limit), longest=limit - 1, room=1).longest_prompt == limit


def runner_like(longest_prompt: int) -> HostRunner:
    runner = HostRunner.__new__(HostRunner)
    runner.geometry = replace(geometry(), longest_prompt=longest_prompt)
    return runner


@pytest.mark.parametrize("longest", [SMALLEST_PROMPT, 256, 1000, 48, 1])
def test_prompts_are_padded_to_a_bucket(longest):
    """Each bucket at most doubles the one before, the last is the longest prompt, and none goes beyond it."""
    sizes = runner_like(longest)._buckets()
    assert sizes[-1] == longest
    assert sizes[0] == min(SMALLEST_PROMPT, longest)
    assert all(small < large <= 2 * small for small, large in zip(sizes, sizes[1:], strict=False))


def test_equal_rules_have_equal_names():
    """Processors are made anew for every call; their numbers tell them apart."""

    def rule(temperature, sample=True):
        return Rule(LogitsProcessorList([TemperatureLogitsWarper(temperature)]), sample)

    names = {geometry(rule=one).rule for one in (rule(0.7), rule(0.7), rule(0.8), rule(0.7, False), GREEDY)}
    assert len(names) == 4


def test_a_runner_serves_what_is_no_larger():
    model = model_of(2048)
    known = geometry(model, longest=300, room=700)
    for longest, room, served in ((300, 700, True), (5, 3, True), (600, 1, False), (5, 1500, False)):
        assert graph_runner._serves(known, geometry(model, longest=longest, room=room)) is served


@pytest.mark.parametrize(
    "other",
    [
        {"batch": 2},
        {"plan": DraftPlan.plain()},
        {"rule": "x"},
        {"phases": True},
        {"weights": (1, 0)},
    ],
    ids=str,
)
def test_a_runner_serves_nothing_else(other):
    known = geometry()
    assert not graph_runner._serves(known, replace(known, **other))


class _Runner:
    """Stands for a captured runner and counts how many were made."""

    made: list[Geometry] = []

    def __init__(self, model, geometry, rule):
        self.made.append(geometry)


@pytest.fixture
def bare(monkeypatch):
    """A model without layers, whose runners are fakes."""
    monkeypatch.setattr(graph_runner, "GraphRunner", _Runner)
    monkeypatch.setattr(_Runner, "made", [])
    return model_of(2048)


def test_runners_are_kept_and_the_least_recent_goes_first(bare):
    sizes = list(range(1, KEPT + 2))
    kept = {batch: geometry(bare, batch=batch) for batch in sizes}
    runners = {batch: runner_for(bare, kept[batch], GREEDY) for batch in sizes[:KEPT]}
    assert runner_for(bare, kept[1], GREEDY) is runners[1]
    runner_for(bare, kept[sizes[-1]], GREEDY)
    assert runner_for(bare, kept[1], GREEDY) is runners[1]
    assert len(_Runner.made) == KEPT + 1
    assert runner_for(bare, kept[2], GREEDY) is not runners[2]
    assert len(bare.__dict__["_graph_runners"]) == KEPT


def test_a_larger_runner_serves_smaller_calls(bare):
    large = runner_for(bare, geometry(bare, longest=700, room=900), GREEDY)
    assert runner_for(bare, geometry(bare, longest=3, room=5), GREEDY) is large
    assert runner_for(bare, geometry(bare, longest=1500, room=5), GREEDY) is not large


def test_released_runners_are_gone(bare, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    release_runners(bare)
    first = runner_for(bare, geometry(bare), GREEDY)
    release_runners(bare)
    assert not {"_graph_runners", "_fused_layers"} & set(bare.__dict__)
    assert runner_for(bare, geometry(bare), GREEDY) is not first


@pytest.fixture
def host(architecture, make_model, monkeypatch):
    """Returns `host(plan, batch, phases)`: a real runner of a small model whose graphs are calls."""
    use_host_runner(monkeypatch)
    model = copy.deepcopy(make_model(architecture))

    def make(plan, batch=1, phases=False) -> HostRunner:
        with torch.no_grad():
            return runner_for(model, geometry_of(model, batch, 10, 20, plan, GREEDY, phases), GREEDY)

    yield make
    model.__dict__["_graph_runners"] = OrderedDict()


@torch.no_grad()
def test_plain_decoding_runs_one_step_ahead_and_never_too_far(host):
    """While a token is read the next is on its way, and none that nobody wants; each is read once."""
    runner, timer = host(DraftPlan.plain()), PhaseTimer(torch.device("cpu"), False)
    for wanted in (5, 1, 3):
        runner.prefill(torch.tensor([[3, 1, 4]]), torch.tensor([3]))
        runner.replays, tokens = 0, []
        for left in range(wanted, 0, -1):
            tokens += runner.step(left, timer)[0]
            assert runner.replays == min(wanted - left + 2, wanted)
        assert len(tokens) == wanted
        runner.prefill(torch.tensor([[3, 1, 4]]), torch.tensor([3]))
        again = [runner.step(1, timer)[0][0] for _ in range(wanted)]
        assert again == tokens


@torch.no_grad()
def test_a_step_that_nobody_read_is_forgotten(host):
    """A call that ended early left one under way; the next call must not take its token for one of its own."""
    runner, timer = host(DraftPlan.plain()), PhaseTimer(torch.device("cpu"), False)

    def tokens(prompt: list[int], count: int) -> list[int]:
        runner.prefill(torch.tensor([prompt]), torch.tensor([len(prompt)]))
        return [runner.step(9, timer)[0][0] for _ in range(count)]

    want = tokens([3, 1, 4], 4)
    for count in (1, 2, 3):
        tokens([7, 2, 11, 5], count)
        assert tokens([3, 1, 4], 4) == want


@torch.no_grad()
def test_drafting_never_runs_ahead(host):
    runner, timer = host(TREE), PhaseTimer(torch.device("cpu"), False)
    runner.prefill(torch.tensor([[3, 1, 4]]), torch.tensor([3]))
    runner.replays = 0
    for step in range(1, 4):
        runner.step(20, timer)
        assert runner.replays == step


@torch.no_grad()
def test_a_step_that_there_will_be_starts_before_anything_else_is_done(host):
    """It is launched as soon as the tokens in front of it are read, and read as if it had been launched when asked for."""
    timer, prompt = PhaseTimer(torch.device("cpu"), False), (torch.tensor([[3, 1, 4]]), torch.tensor([3]))
    runner = host(TREE)
    runner.prefill(*prompt)
    want = [runner.step(20, timer) for _ in range(4)]
    runner.prefill(*prompt)
    runner.replays, seen = 0, []
    for step, on in enumerate((True, True, False, True), start=1):
        emitted = runner.step(20, timer, lambda tokens, on=on: seen.append(tokens) or on)
        assert emitted == seen[-1]
        assert runner.replays == step + on
    assert seen == want
    runner.prefill(*prompt)  # what was on its way is forgotten
    assert [runner.step(20, timer) for _ in range(4)] == want


@torch.no_grad()
def test_padding_of_a_bucket_is_not_seen(host):
    """What earlier prompts left behind in the bucket changes nothing."""
    runner, timer = host(TREE), PhaseTimer(torch.device("cpu"), False)
    prompt, lengths = torch.tensor([[3, 1, 4]]), torch.tensor([3])
    first = runner.prefill(prompt, lengths)
    tokens = [runner.step(9, timer) for _ in range(3)]
    runner.prefill(torch.tensor([[7] * 40]), torch.tensor([40]))
    assert runner.prefill(prompt, lengths) == first
    assert [runner.step(9, timer) for _ in range(3)] == tokens


@torch.no_grad()
def test_kernels_of_all_passes_are_compiled_before_the_first_is_captured(host, monkeypatch):
    done, walked = [], []
    monkeypatch.setattr(graph_runner, "compile_ahead", lambda device, works: walked.extend(works))
    capture = HostRunner._capture
    monkeypatch.setattr(
        HostRunner, "_capture", lambda self, work: done.append(len(walked)) or capture(self, work)
    )
    runner = host(TREE)
    assert done
    assert min(done) == 1
    for name in ("prefill", "forward", "verify", "commit", "draft"):
        work = getattr(runner.step_buffers, name)
        monkeypatch.setattr(
            runner.step_buffers, name, lambda *given, work=work, name=name: (done.append(name), work(*given))
        )
    done.clear()
    walked[0]()
    assert done == ["prefill"] * len(runner._prefills) + ["forward", "verify", "commit", "draft"]


@torch.no_grad()
def test_the_first_token_is_read_before_anything_is_drafted(host, monkeypatch):
    """It leaves on a branch of its own, so that the time to the first token holds no drafting."""
    done = []
    runner = host(TREE)
    for name in ("prefill", "draft"):
        work = getattr(runner.step_buffers, name)
        monkeypatch.setattr(
            runner.step_buffers, name, lambda *given, work=work, name=name: (done.append(name), work(*given))
        )
    publish = runner._publish
    monkeypatch.setattr(runner, "_publish", lambda *given: (done.append("publish"), publish(*given)))
    tokens, finite = runner.prefill(torch.tensor([[3, 1, 4]]), torch.tensor([3]))
    assert done == ["prefill", "publish", "draft"]
    assert (tokens, finite) == (runner.step_buffers.first[:, 0].tolist(), True)


@torch.no_grad()
def test_prompts_of_a_batch_keep_their_lengths(host):
    """They share one buffer with their lengths; each sequence's first token is the one it has alone."""
    rows = [[3, 1, 4, 1, 5], [2, 7], [1, 8, 2]]
    alone = [host(TREE).prefill(torch.tensor([row]), torch.tensor([len(row)]))[0][0] for row in rows]
    padded = torch.tensor([row + [9] * (5 - len(row)) for row in rows])
    runner = host(TREE, batch=3)
    assert runner.prefill(padded, torch.tensor([len(row) for row in rows]))[0] == alone
    assert runner.step_buffers.state.lengths.tolist() == [5, 2, 3]
