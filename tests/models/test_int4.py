"""`int4` with a precision plan: the recipe carries the plan, and a worker needs nothing else."""

import json

import pytest

from huggingface.transformers.integrations.quantized_linear import QuantizedLinear
from models import Limits, Recipe, fold
from models.loading import load
from models.loading.packed import check_unquantized, packed_config
from tests.models.loaders import CPU, PROMPT


@pytest.fixture
def plan(architecture, tmp_path):
    """A plan's file, and the two layers it names."""
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    if architecture.startswith("gpt"):
        names = ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    file = tmp_path / "plan.json"
    modules = {names[0]: {"bits": 8}, names[1]: "plain"}
    file.write_text(json.dumps({"default": {"bits": 4, "group_size": 32}, "modules": modules}))
    return file, names


def test_a_recipe_carries_its_plan(plan, stream_checkpoint):
    file, names = plan
    recipe = fold("int4+spec_stream", {"precision_plan": str(file)}, CPU)
    file.unlink()
    told = json.loads(json.dumps(recipe.to_json()))
    assert Recipe.from_json(told) == recipe
    assert hash(Recipe.from_json(told)) == hash(recipe)
    model = load(told, stream_checkpoint, "cpu", draft_nodes=4).model
    found = {
        name: module.kind.bits
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    assert found[names[0]] == 8
    assert names[1] not in found
    assert set(found.values()) == {4, 8}
    plain = load(recipe.without_drafts(), stream_checkpoint, "cpu")
    drafted = load(recipe, stream_checkpoint, "cpu", draft_nodes=4)
    answers = [one.generate([PROMPT], Limits(max_new_tokens=12))[0].token_ids for one in (plain, drafted)]
    assert answers[0] == answers[1]


def test_random_weights_take_a_plan_too(plan, stock_checkpoint):
    recipe = fold("int4", {"precision_plan": str(plan[0])}, CPU)
    model = load(recipe, stock_checkpoint, "cpu", random_weights=True).model
    assert isinstance(model.get_submodule(plan[1][0]), QuantizedLinear)
    assert not isinstance(model.get_submodule(plan[1][1]), QuantizedLinear)


def test_other_plans_are_other_recipes(plan):
    file = plan[0]
    first = fold("int4", {"precision_plan": str(file)})
    values = json.loads(file.read_text())
    values["modules"].popitem()
    file.write_text(json.dumps(values))
    second = fold("int4", {"precision_plan": str(file)})
    assert first.digest != second.digest
    assert fold("int4").weights == "int4-group128"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"precision_plan": "nowhere.json"}, "--precision_plan nowhere.json cannot be read"),
        ({"group_size": 32}, "--group_size and --precision_plan both say the format"),
        ({"int4_scheme": "naive"}, "--int4_scheme and --precision_plan both say the format"),
    ],
)
def test_wrong_flags_are_named_before_anything_loads(plan, flags, message):
    with pytest.raises(ValueError, match=message):
        fold("int4", {"precision_plan": str(plan[0])} | flags)


def test_a_plan_for_another_model_is_refused(plan, stock_checkpoint):
    values = json.loads(plan[0].read_text())
    values["modules"]["transformer.h.99.mlp.c_fc"] = {"bits": 8}
    plan[0].write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"the precision plan names transformer\.h\.99\.mlp\.c_fc"):
        load(fold("int4", {"precision_plan": str(plan[0])}, CPU), stock_checkpoint, "cpu")


def test_a_mixed_checkpoint_is_taken_by_its_own_plan_alone(plan):
    weights = fold("int4", {"precision_plan": str(plan[0])}).weights
    saved = packed_config(weights).to_dict()
    check_unquantized(saved, weights, "here")
    check_unquantized(saved, None, "here")
    with pytest.raises(
        ValueError,
        match=r"quantised already \(4 bits, group size 32, with a precision plan\).* for int4-group32,",
    ):
        check_unquantized(saved, "int4-group32", "here")
