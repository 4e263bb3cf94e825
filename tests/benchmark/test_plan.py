import itertools

from hypothesis import given
from hypothesis import strategies as st

from benchmark.plan import batches, make_groups, schedule, single_pass
from tests.benchmark.builders import a_plan


def names(turns):
    return [turn.cell.model_type for turn in turns]


def test_techniques_take_turns_on_every_prompt():
    turns = list(schedule(a_plan(prompts=2, repeats=2), set()))
    assert names(turns) == ["naive", "static", "spec_stream"] * 4
    assert [turn.prompt_ids for turn in turns[::3]] == [("p0",), ("p1",)] * 2
    assert len({turn.request for turn in turns}) == len(turns)


def test_the_baseline_is_in_every_group():
    plan = a_plan(groups=(("naive", "static"), ("naive", "spec_stream")))
    assert names(schedule(plan, set())) == ["naive", "static"] * 2 + ["naive", "spec_stream"] * 2


@given(st.data())
def test_resuming_anywhere_asks_for_the_rest_and_nothing_twice(data):
    plan = a_plan(
        prompts=data.draw(st.integers(1, 5)),
        repeats=data.draw(st.integers(1, 3)),
        batch_sizes=data.draw(st.sampled_from([(1,), (2,), (1, 3)])),
    )
    whole = [turn.request for turn in schedule(plan, set())]
    done = set(data.draw(st.lists(st.sampled_from(whole), unique=True)))
    rest = [turn.request for turn in schedule(plan, done)]
    assert rest == [request for request in whole if request not in done]


@given(st.integers(0, 20), st.integers(1, 8))
def test_batches_hold_every_prompt_once(count, size):
    ids = [str(index) for index in range(count)]
    parts = batches(ids, size)
    assert list(itertools.chain(*parts)) == ids
    assert all(0 < len(part) <= size for part in parts)


def test_a_single_pass_asks_the_baseline_once_whatever_the_groups():
    plan = a_plan(groups=(("naive", "static"), ("naive", "spec_stream")), repeats=3)
    once = names(single_pass(plan, list(plan.contenders), set()))
    assert sorted(once) == sorted([*plan.contenders, *plan.contenders])  # two prompts each
    swept = list(single_pass(plan, ["spec_stream"], set(), 0.5))
    assert {turn.acceptance_ratio for turn in swept} == {0.5}
    assert list(single_pass(plan, ["spec_stream"], {turn.request for turn in swept}, 0.5)) == []
    assert len(list(single_pass(plan, ["spec_stream"], {turn.request for turn in swept}, 0.6))) == 2


def test_groups_fit_the_memory_with_the_baseline_in_each():
    sizes = {"a": 4, "b": 3, "c": 3, "d": 20}
    assert make_groups("a", ["b", "c"], sizes, 10) == (("a", "b", "c"),)
    assert make_groups("a", ["b", "c"], sizes, 9) == (("a", "b"), ("a", "c"))
    assert make_groups("a", ["d", "b"], sizes, 9) == (("a", "d"), ("a", "b"))
    assert make_groups("a", [], sizes, 1) == (("a",),)


def test_a_technique_without_batches_sits_out_the_larger_ones():
    plan = a_plan(names=("naive", "prompt_lookup"), batch_sizes=(1, 2), largest_batch={"prompt_lookup": 1})
    turns = list(schedule(plan, set()))
    assert {turn.cell.batch_size for turn in turns if turn.cell.model_type == "prompt_lookup"} == {1}
    assert {turn.cell.batch_size for turn in turns if turn.cell.model_type == "naive"} == {1, 2}
