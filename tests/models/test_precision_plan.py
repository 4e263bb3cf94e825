"""Precision plans as files: what they mean, and what is wrong with them. No torch needed."""

import json

import pytest

from models.precision_plan import normal_plan, plan_text, read_plan

PLAN = {"default": {"bits": 4, "group_size": 64}, "modules": {"b": "plain", "a": {"bits": 8}}}


def test_equal_plans_mean_the_same(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN | {"model": "some", "budget": 1.25, "bytes": 12}))
    assert read_plan(file) == normal_plan(PLAN)
    assert plan_text(PLAN) == (
        '{"default":{"bits":4,"group_size":64,"zero_point":false},'
        '"modules":{"a":{"bits":8,"group_size":null,"zero_point":false},"b":"plain"}}'
    )
    full = {
        "default": {"bits": 4, "group_size": 64, "zero_point": False},
        "modules": {"a": {"bits": 8}, "b": "plain"},
    }
    assert plan_text(full) == plan_text(PLAN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default": "plain"}, "'default' is 'plain'"),
        ({"default": None}, "'default' is None"),
        ({"default": {"bits": 3}}, "has 3 bits, expected 4 or 8"),
        ({"default": {"bits": True}}, "has True bits"),
        ({"default": {"bits": 4, "group_size": 48}}, "groups of 48"),
        ({"default": {"bits": 4, "zero_point": True}}, "true needs a group size"),
        ({"modules": {"a": {"bits": 8, "group_size": 32}}}, "module 'a' has groups of 32 with 8 bits"),
        ({"modules": {"a": {"bit": 8}}}, "module 'a' has an unknown field 'bit': did you mean 'bits'"),
        ({"modules": {"a": 8}}, "module 'a' is 8"),
        ({"modules": ["a"]}, "'modules' is no object"),
        ({"module": {}}, "no field 'module': did you mean 'modules'"),
    ],
)
def test_what_is_no_plan_is_named(change, message, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(PLAN | change))
    with pytest.raises(ValueError, match="plan.json") as error:
        read_plan(file)
    assert message in str(error.value)


@pytest.mark.parametrize("content", [None, b"{", b"\xff", b"[1]"])
def test_unreadable_files_are_named(content, tmp_path):
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"--precision_plan .*plan\.json"):
        read_plan(file)
