"""The technique `assisted`: its options, what it needs, and what it is without its drafts. No torch needed."""

import pytest

from models import Machine, Recipe, fold, largest_batch, unavailable

CPU = Machine("cpu")
FLAGS = {"assistant_model": "somewhere"}


def test_options_are_upstreams_by_default():
    assert fold("assisted", FLAGS).generate_options == {
        "num_assistant_tokens": 20,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.4,
    }


def test_defaults_are_those_of_the_installed_transformers():
    from transformers import GenerationConfig

    upstream = GenerationConfig._get_default_generation_params()
    options = fold("assisted", FLAGS).generate_options
    assert {name: upstream[name] for name in options} == options


def test_the_assistant_is_no_part_of_the_recipe():
    """Like the checkpoint it is named when the recipe is loaded: one recipe serves any assistant."""
    assert fold("assisted", FLAGS) == fold("assisted")


def test_without_an_assistant_it_cannot_run_and_says_which_flag():
    assert "--assistant_model" in unavailable("assisted", CPU)
    assert unavailable("assisted", CPU, FLAGS) is None
    assert unavailable("prompt_lookup", CPU, FLAGS) is None


def test_it_takes_one_prompt_at_a_time():
    assert largest_batch("assisted") == 1


@pytest.mark.parametrize(
    "flags",
    [
        {"num_assistant_tokens": 0},
        {"num_assistant_tokens_schedule": "heuristic"},  # would carry over from prompt to prompt
        {"assistant_confidence_threshold": 1.5},
        {"assistant_confidence_threshold": float("nan")},
    ],
)
def test_value_out_of_range_names_the_flag(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} got"):
        fold("assisted", FLAGS | flags)


def test_upstreams_speculation_needs_upstreams_decoder_with_a_cache():
    for drafts in ("assistant", "prompt_lookup"):
        for slots in ({"decoder": "engine"}, {"decoder": "stock", "kv": "none"}):
            with pytest.raises(ValueError, match=f"'{drafts}' is upstream's"):
                Recipe(drafts=drafts, **slots).check()


@pytest.mark.parametrize("other", ["prompt_lookup", "spec_stream", "kv_cache", "no_cache"])
def test_it_combines_with_nothing_that_decodes(other):
    with pytest.raises(ValueError, match="both decide 'decoder'"):
        fold(f"assisted+{other}", FLAGS)
