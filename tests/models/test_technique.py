"""Recipes: slots, clashes, resolution, twins. No torch needed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
from models import TECHNIQUES, Machine, Recipe, build, fold, unavailable
from models.technique import Technique, combine

CPU = Machine("cpu")
CUDA = Machine("cuda", "some card", (9, 0))


class PackedCache(Technique):
    name = "packed_cache"
    summary = "a cache slot of its own, as a later technique will claim it"

    def apply(self, recipe: Recipe) -> Recipe:
        return recipe.claim(kv="int8")


def test_every_technique_is_named_like_its_file_and_resolves():
    for name, technique in TECHNIQUES.items():
        assert technique.__module__ == f"models.{name}"
        recipe = fold(name, machine=CUDA)
        assert None not in (recipe.dtype, recipe.attention, recipe.weights, recipe.kv, recipe.decoder)


def test_slot_claimed_twice_names_both_and_the_slot():
    with pytest.raises(ValueError, match=r"^naive\+spec_stream: both decide 'decoder'"):
        fold("naive+spec_stream")


def test_clash_names_the_two_that_clash_among_three():
    with pytest.raises(ValueError, match=r"^naive\+spec_stream: both decide 'decoder'"):
        combine(
            [
                PackedCache(),
                *build("naive")[:0],
                *build("static")[:0],
                *_without_kv("naive"),
                *build("spec_stream"),
            ]
        )


def _without_kv(name: str) -> list[Technique]:
    class Bare(Technique):
        def apply(self, recipe: Recipe) -> Recipe:
            return recipe.claim(decoder="stock")

    Bare.name = name
    return [Bare()]


def test_stock_decoder_takes_no_draft_tree():
    with pytest.raises(ValueError, match="draft tree"):
        Recipe(decoder="stock", drafts="streams").check()


def test_stock_decoder_takes_no_packed_cache():
    bare = _without_kv("plain")
    with pytest.raises(ValueError, match=r"packed_cache\+plain: the stock decoder takes no 'int8' cache"):
        combine([PackedCache(), *bare])


def test_engine_takes_a_cache_technique():
    recipe = combine([PackedCache(), *build("spec_stream")]).resolved(CPU)
    assert (recipe.decoder, recipe.kv, recipe.drafts) == ("engine", "int8", "streams")


def test_engine_takes_no_flash():
    with pytest.raises(ValueError, match="use sdpa"):
        Recipe(attention="flash").check()


@pytest.mark.parametrize(
    ("name", "machine", "dtype", "expected"),
    [
        ("naive", CPU, "auto", "float32"),
        ("naive", CUDA, "bfloat16", "float32"),
        ("half", CPU, "auto", "bfloat16"),
        ("half", CUDA, "auto", "bfloat16"),
        ("half", CUDA, "float16", "float16"),
        ("half", CUDA, "float32", "bfloat16"),
        ("spec_stream", CPU, "auto", "float32"),
        ("spec_stream", CUDA, "auto", "bfloat16"),
        ("kv_cache", CUDA, "float32", "float32"),
    ],
)
def test_dtype(name, machine, dtype, expected):
    assert fold(name, {"dtype": dtype}, machine).dtype == expected


def test_attention_of_the_run_fills_open_slots_only():
    flags = {"attn_implementation": "eager"}
    assert fold("spec_stream", flags, CPU).attention == "eager"
    assert fold("naive", flags, CPU).attention == "default"
    assert fold("flash", flags, CUDA).attention == "flash"


@pytest.mark.parametrize("flags", [{"attn_implementation": "flash"}, {"dtype": "int8"}])
def test_unknown_choice_is_refused_with_the_choices(flags):
    with pytest.raises(ValueError, match="expected one of auto"):
        fold("spec_stream", flags, CPU)


def test_unknown_technique_names_the_nearest():
    with pytest.raises(ValueError, match="unknown technique 'spec_steam': did you mean 'spec_stream'"):
        fold("spec_steam")
    with pytest.raises(ValueError, match="available: naive"):
        fold("zzz")


@pytest.mark.parametrize("name", models.RESERVED)
def test_reserved_technique_says_so(name):
    with pytest.raises(ValueError, match="not built yet"):
        fold(f"{name}+spec_stream")


def test_repeated_technique_is_refused():
    with pytest.raises(ValueError, match="named twice"):
        fold("naive+naive")


@pytest.mark.parametrize(
    ("name", "flags"),
    [("spec_stream", {"draft_nodes": 0}), ("spec_stream", {"draft_nodes": "many"}),
     ("prompt_lookup", {"prompt_lookup_num_tokens": 0})],
)  # fmt: skip
def test_value_out_of_range_names_the_flag(name, flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} got"):
        fold(name, flags)


def test_flags_reach_the_recipe():
    assert fold("spec_stream", {"draft_nodes": 8, "seed": 1}).generate_options == {"draft_nodes": 8}


def test_flash_is_unavailable_with_a_reason():
    assert "need a CUDA device" in unavailable(
        "flash", {"device": "cpu", "device_name": "x", "capability": None}
    )
    assert "8.0 or newer" in unavailable("flash", Machine("cuda", "old card", (7, 5)))
    assert unavailable("flash", {"device": "cuda:0", "device_name": "new card", "capability": [9, 0]}) is None
    assert unavailable("spec_stream", CPU) is None


@pytest.mark.parametrize("drafting", ["spec_stream", "prompt_lookup", "assisted"])
def test_twin_is_the_recipe_without_drafts(drafting):
    twin = fold(drafting, machine=CPU).without_drafts()
    plain = fold("static" if drafting == "spec_stream" else "kv_cache", machine=CPU)
    assert twin == plain
    assert twin.digest == plain.digest != fold(drafting, machine=CPU).digest


@given(
    name=st.sampled_from(sorted(TECHNIQUES)),
    dtype=st.sampled_from(["auto", "float32", "float16", "bfloat16"]),
    machine=st.sampled_from([CPU, CUDA]),
)
def test_json_round_trip_and_idempotent_resolution(name, dtype, machine):
    recipe = fold(name, {"dtype": dtype}, machine)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe.resolved(machine) == recipe
    assert Recipe.from_json(recipe.to_json()).digest == recipe.digest


def test_recipe_of_another_version_is_refused():
    with pytest.raises(ValueError, match="another version"):
        Recipe.from_json({"dtype": "float32", "colour": "red"})


def test_claim_leaves_the_original_alone():
    empty = Recipe()
    empty.claim(decoder="stock", generate_options={"a": 1})
    assert empty == Recipe()
