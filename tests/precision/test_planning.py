"""Plans: greedy, under the budget, never apart what one product reads."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precision.planning import Group, choose, expected_change, groups, plan

SIZES = {"default": 10, "int8": 20, "plain": 40}


def group(name, damage, int8=0.0, scale=1):
    sizes = {key: scale * size for key, size in SIZES.items()}
    return Group((name,), {"default": damage, "int8": int8, "plain": 0.0}, sizes)


def test_the_most_damaging_byte_is_spared_first():
    every = [group("a", 0.1), group("b", 0.5), group("c", 0.9, scale=10)]
    assert choose(every, 1.0) == ["default"] * 3
    assert choose(every, 1.1) == ["default", "int8", "default"]  # c would pay ten times as many bytes
    assert choose(every, 2.0) == ["int8", "int8", "int8"]
    assert choose(every, 9.0) == ["int8", "int8", "int8"]  # nothing is left to gain


def test_half_precision_where_int8_does_not_help():
    every = [group("a", 1.0, int8=0.9), group("b", 0.2)]
    assert choose(every, 2.6) == ["plain", "default"]
    assert choose(every, 4.0) == ["plain", "int8"]


def test_harmless_layers_stay():
    every = [group("a", -0.2), group("b", 0.0)]
    assert choose(every, 4.0) == ["default", "default"]


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 9)), min_size=1, max_size=6),
    st.floats(1, 4),
)
def test_no_plan_exceeds_its_budget_or_leaves_a_gain_that_fits(damages, budget):
    every = [group(str(index), *values) for index, values in enumerate(damages)]
    chosen = choose(every, budget)
    least = sum(one.bytes["default"] for one in every)
    spent = sum(one.bytes[name] for one, name in zip(every, chosen, strict=True))
    assert spent <= budget * least
    for (one, name), other in product(zip(every, chosen, strict=True), SIZES):
        added = one.bytes[other] - one.bytes[name]
        assert added <= 0 or one.damage[other] >= one.damage[name] or spent + added > budget * least
    assert expected_change(every, chosen) <= expected_change(every, ["default"] * len(every))


def row(name, change, int8):
    return {"modules": [name], "nll_change": change, "int8_nll_change": int8, "bytes": SIZES}


def test_projections_of_one_product_share_a_format():
    every = groups(
        [
            row("l.q_proj", 0.1, 0.0),
            row("l.k_proj", 0.2, 0.0),
            row("l.v_proj", -0.1, 0.0),
            row("l.o_proj", 0.0, 0.0),
        ]
    )
    assert [one.modules for one in every] == [("l.q_proj", "l.k_proj", "l.v_proj"), ("l.o_proj",)]
    assert every[0].damage["default"] == pytest.approx(0.2)
    assert every[0].bytes == {name: 3 * size for name, size in SIZES.items()}
    values = plan(every, choose(every, 2.0), {"bits": 4})
    assert values == {
        "default": {"bits": 4},
        "modules": dict.fromkeys(["l.k_proj", "l.q_proj", "l.v_proj"], {"bits": 8}),
    }


def test_a_trial_in_8_bits_leaves_half_precision():
    every = groups([row("a", 0.1, None)])
    assert choose(every, 4.0) == ["plain"]
    assert plan(every, ["plain"], {"bits": 8})["modules"] == {"a": "plain"}
