"""Captured decoding emits what plain decoding emits, whatever is drafted; sampled, it draws from the target's distribution.

On a CPU the step runs on the plain references in float64, driven by the real runner (`host_runner.py`); on a GPU it is captured.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from huggingface.transformers.generation import fused_step
from huggingface.transformers.generation.draft_tree import TreeShape
from huggingface.transformers.generation.fused_step import FusedStep
from huggingface.transformers.generation.graph_runner import release_runners
from huggingface.transformers.generation.tree_tuning import DraftPlan
from huggingface.transformers.generation.verification import Rule
from huggingface.transformers.integrations.triton_support import interpreting
from huggingface.transformers.models.spec_stream.fusable import embedding_tables
from tests.architectures import with_heads_of

from .host_runner import use_host_runner
from .test_sampling import _p_value as p_value

VOCAB, EOS, LIMIT = 13, 0, 64
CHECKS = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def grown(nodes: int, streams: int, beam: int = 8, lookup: int = 0, carriers: int | None = None) -> DraftPlan:
    """Returns the plan of a tree grown on the device: of the shape only the nodes and the streams count."""
    return DraftPlan(
        TreeShape((-1, *[0] * (nodes - 1)), streams), beam=beam, lookup=lookup, carriers=carriers
    )


@st.composite
def plans(draw, most_nodes: int) -> DraftPlan:
    if draw(st.integers(0, 7)) == 0:
        return DraftPlan.plain()
    nodes = draw(st.sampled_from([n for n in (2, 3, 5, 8, 16, 32) if n <= most_nodes]))
    beam, lookup = draw(st.sampled_from([1, 8])), draw(st.sampled_from([0, 4]))
    return grown(nodes, draw(st.integers(1, 3)), beam, lookup, draw(st.none() | st.integers(1, nodes)))


@pytest.fixture
def make_fused(make_model, monkeypatch):
    """Returns `make_fused(architecture, dtype, **fields)`: a model of one's own whose `generate` takes the captured path."""
    use_host_runner(monkeypatch)
    return lambda *args, **fields: copy.deepcopy(make_model(*args, **fields))


def decode(model, prompts: list[list[int]], length: int, **options):
    """Returns what each sequence emitted, as the steps counted it, and the statistics of the call."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "pad_token_id": EOS, **options}
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=length,
        return_dict_in_generate=True,
        **options,
    )
    rows = out.sequences[:, longest:].tolist()
    counts = [1 + sum(step.emitted[at] for step in out.statistics.steps) for at in range(len(prompts))]
    assert all(set(row[count:]) <= {EOS} for row, count in zip(rows, counts, strict=True))
    return [row[:count] for row, count in zip(rows, counts, strict=True)], out.statistics


def check_equal(model, prompts, length, plan) -> None:
    want, eager = decode(model, prompts, length, drafts="none", capture=False)
    got, statistics = decode(model, prompts, length, plan=plan)
    assert (eager.runner, statistics.runner) == ("eager", "cuda graph")
    assert got == want
    assert statistics.finish_reasons == eager.finish_reasons


def random_cases(examples: int, most_nodes: int, most_tokens: int):
    short = st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20)
    batches = st.lists(short, min_size=1, max_size=3)

    def decorate(check):
        return settings(CHECKS, max_examples=examples)(
            given(batches, st.integers(1, most_tokens), plans(most_nodes))(check)
        )

    return decorate


def test_any_plan_any_batch(architecture, make_fused):
    """Ragged prompts, EOS anywhere, chains and trees, with and without tokens from the context."""
    model = make_fused(architecture)

    @random_cases(examples=60, most_nodes=8, most_tokens=12)
    def check(prompts, length, plan):
        check_equal(model, prompts, length, plan)

    check()


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="no Triton to interpret")
def test_interpreted_kernels_take_the_same_step(architecture, make_model, monkeypatch):
    """All kernels of a step together, behind a text longer than the windows; heads of a size that they know."""
    fields = {"transition_rank": 0, "stream_layers": 1, **with_heads_of(architecture, 16)}
    model = copy.deepcopy(make_model(architecture, torch.float32, **fields))
    use_host_runner(monkeypatch, interpret=True)
    check_equal(model, [list(range(1, 10))], 3, grown(3, 2, carriers=2))


@pytest.mark.slow
def test_any_plan_any_batch_at_length(architecture, make_fused):
    model = make_fused(architecture, seed=1)

    @random_cases(examples=150, most_nodes=32, most_tokens=40)
    def check(prompts, length, plan):
        check_equal(model, prompts, length, plan)

    check()


@pytest.mark.parametrize("plan", [DraftPlan.plain(), grown(6, 3), grown(5, 2, 1, 4)], ids=["plain", "tree", "chain"])  # fmt: skip
def test_up_to_the_last_position(architecture, plan, make_fused):
    """No room for a whole tree, and at last for none of it; sequences of a batch get there one after the other."""
    model = make_fused(architecture)
    for lengths in ((58,), (63,), (LIMIT - 2, 50), (60, 63, 57)):
        prompts = [[1 + (7 * place + length) % 12 for place in range(length)] for length in lengths]
        check_equal(model, prompts, LIMIT, plan)


@pytest.mark.parametrize(
    "plan", [grown(7, 3), grown(8, 3, carriers=3), grown(4, 3, 1)], ids=["all", "some", "chain"]
)
def test_streams_drafted_from_logits_or_from_states(architecture, plan, make_fused, monkeypatch):
    """The LM head is read once for nodes and streams, or again for the accepted node's: the trees are the same."""
    prompts, emitted = [[3, 1, 4, 1, 5], [9, 2]], []
    for most in (0, 256):
        monkeypatch.setattr(fused_step, "MOST_EXACT_HEAD_ROWS", most)
        model = make_fused(architecture)
        rows, statistics = decode(model, prompts, 20, plan=plan)
        emitted.append((rows, [step.emitted for step in statistics.steps]))
    assert emitted[0] == emitted[1]


def _scaled(model):
    embed = type(model).embed_rows
    model.embed_rows = lambda tokens, positions: 1.5 * embed(model, tokens, positions)


def _hooked(name: str):
    def hook(model):
        module = dict(model.named_modules()).get(f"transformer.{name}") or model.get_input_embeddings()
        module.register_forward_hook(lambda module, args, out: 1.5 * out)

    return hook


@pytest.mark.parametrize("change", [_scaled, _hooked("wpe"), _hooked("drop")], ids=["scaled", "wpe", "drop"])
def test_embeddings_that_are_more_than_rows_of_tables(architecture, change, make_fused):
    """One kernel adds rows up; where the model does more, a step asks the model."""
    model = make_fused(architecture)
    assert embedding_tables(model) is not None
    change(model)
    assert embedding_tables(model) is None
    check_equal(model, [[3, 1, 4, 1, 5], [9, 2]], 12, grown(6, 3))


def test_thirty_two_nodes(architecture, make_fused):
    model = make_fused(architecture)
    check_equal(model, [[3, 1, 4, 1, 5], [9, 2]], 10, grown(32, 3, lookup=4))


@pytest.mark.parametrize(
    "fields", [{"lora_rank": 0}, {"transition_rank": 0}, {"streams": 1, "stream_layers": 4}, {"streams": 0}], ids=str
)  # fmt: skip
def test_other_streams(architecture, fields, make_fused):
    model = make_fused(architecture, **fields)
    streams = model.config.streams
    check_equal(
        model, [[3, 1, 4, 1, 5], [9, 2]], 14, grown(6, streams, lookup=2) if streams else DraftPlan.plain()
    )


def test_accepted_drafts_are_many(architecture, make_fused):
    """Where text repeats itself, the context is a good draft: steps are fewer than tokens, and nothing else changes."""
    model = make_fused(architecture, torch.float64)
    for seed in range(4):
        prompt = [[1 + (seed + place) % 3 for place in range(20)]]
        check_equal(model, prompt, 40, grown(8, 3, lookup=4))
    _, statistics = decode(model, prompt, 40, plan=grown(8, 3, lookup=4), eos_token_id=99)
    assert len(statistics.steps) < 30


def test_one_call_leaves_nothing_for_the_next(architecture, make_fused):
    """Buffers are kept: shorter prompts after longer ones, and calls that ended early, find no trace of them."""
    model, plan = make_fused(architecture), grown(7, 3, lookup=4)
    long, short = [[1 + place % 12 for place in range(40)]], [[5, 6]]
    for prompts in (long, short, long, [[7]]):
        check_equal(model, prompts, 9, plan)
    assert len(model.__dict__["_graph_runners"]) == 1
    release_runners(model)
    assert "_graph_runners" not in model.__dict__


def test_a_sequence_that_has_ended_stays(architecture, make_fused):
    """Its length and what the cache holds of it no longer change while others go on."""
    model = make_fused(architecture)
    with torch.no_grad():
        step = FusedStep(model, 2, 64, grown(6, 3, lookup=3), Rule(LogitsProcessorList()))
        step.prepare_prefill(8)
        step.prefill(torch.randint(1, 13, (2, 8)), torch.tensor([8, 5]))
        step.draft()
        step.state.finished.copy_(torch.tensor([False, True]))
        lengths = step.state.lengths.tolist()
        kept = [block[:, :, 1, :, :5].clone() for block in (step.cache.below, step.cache.above)]
        history = step.state.history[1].clone()
        for _ in range(4):
            for phase in (step.forward, step.verify, step.commit, step.draft):
                phase()
        assert step.state.lengths[1] == lengths[1]
        assert step.state.lengths[0] >= lengths[0] + 4
        assert torch.equal(step.state.history[1], history)
        for block, before in zip((step.cache.below, step.cache.above), kept, strict=True):
            assert torch.equal(block[:, :, 1, :, :5], before)


def test_infinite_logits_are_reported(make_fused):
    model = make_fused("llama")
    model.get_output_embeddings().weight.data[2] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        decode(model, [[3, 1]], 4, plan=grown(4, 2))


@pytest.mark.parametrize("phases", [False, True])
def test_phases_are_timed_only_on_demand(phases, make_fused):
    model = make_fused("gpt_neo")
    want, _ = decode(model, [[3, 1, 4]], 10, drafts="none", capture=False)
    got, statistics = decode(model, [[3, 1, 4]], 10, plan=grown(6, 3), record_phases=phases)
    assert got == want
    names = {"prefill", "forward", "verify", "commit", "draft", "host"}
    assert set(statistics.phases_s or ()) == (names if phases else set())


# Sampling.
def joint_of_two(model, prompt: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Returns the exact (vocab, vocab) distribution of the second and third tokens, whatever the first."""
    vocab = model.config.vocab_size
    with torch.no_grad():

        def after(*tokens):
            ids = torch.tensor([[*prompt, *tokens]], device=model.device)
            return (model(ids).logits[0, -1].double() / temperature).softmax(-1).cpu()

        first = after()
        joint = torch.zeros(vocab, vocab, dtype=torch.float64)
        for a in range(vocab):
            second = after(a)
            for b in range(vocab):
                joint[b] += first[a] * second[b] * after(a, b)
    return joint


def draw(model, prompt, plan, draws: int, rounds: int, **options) -> torch.Tensor:
    """Returns the (vocab, vocab) histogram of second and third tokens: what the steps emit after prefill picked the first."""
    vocab = model.config.vocab_size
    counts = torch.zeros(vocab * vocab, dtype=torch.float64)
    for _ in range(rounds):
        ids = torch.tensor([prompt] * draws, device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=3,
            eos_token_id=99, pad_token_id=0, plan=plan, **options,
        ).cpu()  # fmt: skip
        at = len(prompt)
        counts += torch.bincount(out[:, at + 1] * vocab + out[:, at + 2], minlength=vocab * vocab)
    return counts.view(vocab, vocab)


SMALL = {"vocab_size": 4, "streams": 2, "stream_layers": 1}


@pytest.mark.parametrize("architecture, temperature", [("gpt_neo", 1.0), ("llama", 0.6)])
def test_sampling_draws_from_the_target(architecture, temperature, make_fused):
    """Trees that accept often: four tokens, of which a tree of six nodes offers two at every place."""
    model, prompt = make_fused(architecture, torch.float32, **SMALL), [3, 1, 2]
    want = joint_of_two(model, prompt, temperature)
    torch.manual_seed(3)
    counts = draw(model, prompt, grown(6, 2, beam=2), 500, 2, temperature=temperature)
    assert p_value(counts.flatten(), want.flatten()) > 1e-4


def test_a_rule_that_favours_drafts_is_found_out(make_fused, monkeypatch):
    """The test above can fail: a target that takes one draft in four as it stands is no longer itself."""
    model, prompt = make_fused("llama", torch.float32, **SMALL), [3, 1, 2]
    pick = Rule.pick

    def biased(rule, scores):
        chosen = pick(rule, scores)
        return torch.where(torch.rand_like(chosen, dtype=torch.float32) < 0.25, 1, chosen)

    want = joint_of_two(model, prompt)
    monkeypatch.setattr(Rule, "pick", biased)
    torch.manual_seed(3)
    counts = draw(model, prompt, grown(6, 2, beam=2), 500, 1)
    assert p_value(counts.flatten(), want.flatten()) < 1e-4


@pytest.mark.slow
def test_many_draws_from_the_target(architecture, make_fused):
    model, prompt = make_fused(architecture, torch.float32, **SMALL), [3, 1, 2]
    torch.manual_seed(4)
    counts = draw(model, prompt, grown(6, 2, beam=2, lookup=2), 2000, 10)
    assert p_value(counts.flatten(), joint_of_two(model, prompt).flatten()) > 1e-4


def test_a_sampled_step_uses_the_processors(make_fused):
    """A tiny temperature is greedy."""
    model = make_fused("gpt_neo")
    want, _ = decode(model, [[3, 1, 4]], 12, drafts="none", capture=False)
    got, statistics = decode(model, [[3, 1, 4]], 12, plan=grown(6, 3), do_sample=True, temperature=1e-4)
    assert (got, statistics.runner) == (want, "cuda graph")
    assert TemperatureLogitsWarper.__name__ in next(iter(model.__dict__["_graph_runners"])).rule


def test_a_seed_gives_the_same_tokens_whether_or_not_graphs_are_there(make_fused):
    """What capturing draws is not missing from the call that captures."""
    check_seed(make_fused("llama", torch.float32))


def check_seed(model) -> None:
    results = []
    for _ in range(3):
        torch.manual_seed(11)
        results.append(decode(model, [[3, 1, 4]], 12, plan=grown(6, 3), do_sample=True, top_k=0)[0])
    assert results[0] == results[1] == results[2]


# On a GPU: what is captured, in float32, where arithmetic of another order does not change the best token.
@pytest.fixture
def on_gpu(make_model):
    """Returns `on_gpu(architecture, dtype, **fields)`: a model with heads of a size that the kernels know."""

    def make(architecture, dtype=torch.float32, **fields):
        heads = with_heads_of(architecture, 32)
        return copy.deepcopy(make_model(architecture, dtype, **heads, **fields)).cuda()

    return make


GPU_PLANS = [DraftPlan.plain(), grown(8, 3), grown(32, 3, lookup=4), grown(4, 3, 1)]
GPU_NAMES = ["plain", "tree", "large", "chain"]


@pytest.mark.gpu
@pytest.mark.parametrize("plan", GPU_PLANS, ids=GPU_NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def test_captured_equals_eager_on_the_gpu(architecture, batch, plan, on_gpu):
    model = on_gpu(architecture)
    generator = torch.Generator().manual_seed(batch)
    for longest in (5, 40, 9):
        lengths = [max(1, longest - 3 * row) for row in range(batch)]
        prompts = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]
        check_equal(model, prompts, 60, plan)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{"lora_rank": 0}, {"transition_rank": 0}, {"streams": 1}], ids=str)
def test_other_streams_on_the_gpu(architecture, fields, on_gpu):
    model = on_gpu(architecture, **fields)
    check_equal(model, [[3, 1, 4, 1, 5], [9, 2]], 30, grown(6, model.config.streams))


@pytest.mark.gpu
def test_a_model_that_ran_on_the_cpu_before(architecture, on_gpu):
    """Its linears were packed there."""
    model = on_gpu(architecture).cpu()
    want, _ = decode(model, [[3, 1, 4]], 20, drafts="none")
    model.cuda()
    got, statistics = decode(model, [[3, 1, 4]], 20, plan=grown(6, 3))
    assert (got, statistics.runner, statistics.fallbacks) == (want, "cuda graph", [])


@pytest.mark.gpu
def test_half_precision_differs_from_the_eager_step_at_near_ties_alone(architecture, on_gpu):
    """What follows a token that fell the other way differs, so first differences are judged, in float32.

    How near a tie is follows gate G3: four times what bfloat16 changes of the eager step's own logits.
    """
    model = on_gpu(architecture, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    same, gaps, errors = 0, [0.0], []
    for seed in range(40):
        prompt = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(seed)).tolist()
        want, _ = decode(model, prompt, 4, drafts="none", capture=False, eos_token_id=99)
        got, _ = decode(model, prompt, 4, plan=grown(8, 3), eos_token_id=99)
        first = next(
            (at for at, pair in enumerate(zip(got[0], want[0], strict=True)) if pair[0] != pair[1]), 3
        )
        ids = torch.tensor([prompt[0] + want[0][:first]], device="cuda")
        with torch.no_grad():
            logits, rounded = exact(ids).logits[0, -1], model(ids).logits[0, -1].float()
        errors.append(float((logits - rounded).abs().max()))
        gaps.append(abs(float(logits[want[0][first]] - logits[got[0][first]])))
        same += got == want
    assert same >= 24
    assert max(gaps) <= 4 * max(errors)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [DraftPlan.plain(), grown(6, 2, beam=2)], ids=["plain", "tree"])
def test_sampling_on_the_gpu_draws_from_the_target(architecture, plan, on_gpu):
    model, prompt = on_gpu(architecture, **SMALL), [3, 1, 2]
    torch.manual_seed(5)
    counts = draw(model, prompt, plan, 1024, 10)
    assert counts.sum() == 10240
    assert p_value(counts.flatten(), joint_of_two(model, prompt).flatten()) > 1e-4


@pytest.mark.gpu
def test_a_seed_on_the_gpu_gives_the_same_tokens(architecture, on_gpu):
    check_seed(on_gpu(architecture))
