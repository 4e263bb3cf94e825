import pytest

from datasets_code import get_dataset


def test_prompts_have_enough_words_and_depend_on_the_seed_alone():
    dataset = get_dataset("synthetic", prompt_tokens=100)
    loaded = dataset.load(limit=3, seed=1)
    assert loaded.source == "generated"
    assert loaded.examples == dataset.load(limit=5, seed=1).examples[:3]
    assert loaded.examples != dataset.load(limit=3, seed=2).examples
    assert len({item.prompt.text for item in loaded.examples}) == 3
    for item in loaded.examples:
        assert len(item.prompt.text.split()) == 100
        assert item.context["prompt_tokens"] == 100


def test_default_number_of_prompts_and_empty_score():
    dataset = get_dataset("synthetic")
    loaded = dataset.load()
    assert len(loaded.examples) == 32
    assert dataset.score([""] * 32, loaded.examples).values == {}
    assert dataset.completion(loaded.examples[0]) == ""


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="--prompt_tokens is 0"):
        get_dataset("synthetic", prompt_tokens=0)
    with pytest.raises(ValueError, match="--limit is 0"):
        get_dataset("synthetic").load(limit=0)
