import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets_code.sql_sandbox_child import Late, same_result


def same(gold, prediction, ordered=False):
    return same_result(gold, prediction, ordered, time.monotonic() + 5)


@pytest.mark.parametrize(
    ("gold", "prediction", "equal"),
    [
        ([(1,)], [(1.0,)], True),
        ([(1,)], [("1",)], False),
        ([("a",)], [(b"a",)], False),
        ([(None,)], [(None,)], True),
        ([(None,)], [(0,)], False),
        ([(None,)], [("",)], False),
        ([(b"\xff",)], [(b"\xff",)], True),
        ([(float("nan"),)], [(float("nan"),)], True),
        ([(float("nan"),)], [(None,)], False),
        ([(float("inf"),)], [(float("inf"),)], True),
        ([], [], True),
        ([], [(1,)], False),
        ([(1,)], [(1,), (1,)], False),
        ([(1,), (1,), (2,)], [(1,), (2,), (2,)], False),
        ([(1, "a")], [("a", 1)], True),
        ([(1, 2)], [(1, 2, 2)], False),
        # columns agree one by one, rows do not
        ([(1, "a"), (2, "b")], [(1, "b"), (2, "a")], False),
        ([("A", "a"), ("a", "B")], [("a", "A"), ("B", "a")], True),
    ],
)
def test_results_compare(gold, prediction, equal):
    assert same(gold, prediction) is equal
    assert same(prediction, gold) is equal


def test_row_order_matters_only_where_gold_orders():
    assert same([(1, "x"), (2, "y")], [("y", 2), ("x", 1)])
    assert not same([(1, "x"), (2, "y")], [("y", 2), ("x", 1)], ordered=True)
    assert same([(1, "x"), (2, "y")], [("x", 1), ("y", 2)], ordered=True)


@pytest.mark.parametrize("ordered", [False, True])
def test_many_equal_columns_are_judged_at_once(ordered):
    start = time.monotonic()
    assert same([(7,) * 12] * 50, [(7,) * 12] * 50, ordered)
    assert time.monotonic() - start < 1


def test_equal_columns_are_not_tried_again_after_a_failure():
    first, second = (1, 0, 0), (0, 1, 0)
    gold = list(zip(*[(7, 7, 7)] * 8, *[first] * 9, strict=True))
    prediction = list(zip(*[(7, 7, 7)] * 8, *[first] * 8, second, strict=True))
    start = time.monotonic()
    assert not same(gold, prediction)
    assert time.monotonic() - start < 1


def test_shuffled_columns_are_found_at_once():
    source = random.Random(0)
    rows = [tuple(source.randint(0, 1) for _ in range(12)) for _ in range(200)]
    order = source.sample(range(12), 12)
    assert same(rows, [tuple(row[index] for index in order) for row in source.sample(rows, 200)])


def test_comparison_has_a_deadline():
    with pytest.raises(Late):
        same_result([(1, 2)], [(2, 1)], False, time.monotonic() - 1)


def brute_force(gold, prediction):
    if len(gold) != len(prediction):
        return False
    if not gold:
        return True
    return any(
        sorted(gold) == sorted(tuple(row[index] for index in order) for row in prediction)
        for order in itertools.permutations(range(len(gold[0])))
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_matching_agrees_with_trying_every_order(data):
    columns = data.draw(st.integers(1, 4))
    rows = st.lists(st.tuples(*[st.integers(0, 2)] * columns), min_size=1, max_size=4)
    gold = data.draw(rows)
    if data.draw(st.booleans()):
        order = data.draw(st.permutations(range(columns)))
        prediction = [tuple(row[index] for index in order) for row in data.draw(st.permutations(gold))]
    else:
        prediction = data.draw(rows)
    assert same(gold, prediction) is brute_force(gold, prediction)
