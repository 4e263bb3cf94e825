"""Whether a call's configuration is the one that upstream prepares, and nobody else's."""

from __future__ import annotations

import inspect
import logging
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin

from huggingface.transformers.generation.configuration_utils import prepare_generation_config


class _Own(GenerationConfig):
    """A configuration with its own mind about copies."""

    def __deepcopy__(self, memo):
        return _Own(max_new_tokens=self.max_new_tokens + 1)


def model_with(**fields) -> SimpleNamespace:
    config = SimpleNamespace(_get_generation_parameters=lambda: {})
    return SimpleNamespace(config=config, generation_config=GenerationConfig(**fields))


HELD = [
    {},
    {"max_new_tokens": 5, "eos_token_id": [1, 2], "temperature": 0.5, "top_k": 3},
    {"spec_stream": {"rank_accuracy": [[0.5, 0.1]], "draft_nodes": {"cpu": 4}}, "_mask_length": 3},
    {"do_sample": True, "cache_implementation": "hybrid", "custom": None, "dtype": torch.bfloat16},
]
GIVEN = [
    None,
    GenerationConfig(),
    GenerationConfig(max_new_tokens=7, do_sample=False, bad_words_ids=[[1], [2, 3]], mine={"a": [1]}),
    GenerationConfig(num_beams=2, eos_token_id=torch.tensor([4, 5]), output_attentions=True),
    _Own(max_new_tokens=3),
]


def fields_of(config: GenerationConfig) -> dict:
    return {name: str(value) for name, value in vars(config).items()}


@pytest.mark.parametrize("held", HELD, ids=range(len(HELD)))
@pytest.mark.parametrize("given", GIVEN, ids=range(len(GIVEN)))
@pytest.mark.parametrize("more", [{}, {"top_p": 0.3, "attention_mask": 1, "no_such": 2}], ids=["", "more"])
def test_it_is_upstreams(held, given, more, caplog, monkeypatch):
    """Fields, what is left for the model, and what is warned of."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    told = []
    for prepare in (prepare_generation_config, GenerationMixin._prepare_generation_config):
        caplog.clear()
        config, left = prepare(model_with(**held), given, **more)
        told.append((type(config), fields_of(config), left, [record.message for record in caplog.records]))
    # What is warned of once is warned of the first time.
    assert told[0][:3] == told[1][:3]
    assert set(told[1][3]) <= set(told[0][3])


@pytest.mark.parametrize("held", HELD, ids=range(len(HELD)))
@pytest.mark.parametrize("given", GIVEN, ids=range(len(GIVEN)))
def test_the_next_call_gets_the_same_and_its_own(held, given):
    model, mask = model_with(**held), torch.ones(2)
    arguments = {"top_p": 0.3, "attention_mask": mask, "no_such": 2}
    expected, _ = GenerationMixin._prepare_generation_config(model, given, **arguments)
    for _ in range(3):
        config, left = prepare_generation_config(model, given, **arguments)
        assert (fields_of(config), left) == (
            fields_of(expected),
            {"attention_mask": mask, "no_such": 2} | _attentions(expected),
        )
        for value in vars(config).values():
            if isinstance(value, list):
                value.append(9)
        config.max_new_tokens = config.mine = 9


def _attentions(config: GenerationConfig) -> dict:
    return {"output_attentions": True} if config.output_attentions else {}


def test_whatever_changes_between_calls_is_seen():
    model = model_with(eos_token_id=[1, 2], spec={"sizes": [3]})
    given = GenerationConfig(bad_words_ids=[[1]], top_k=1)

    def prepared(**arguments) -> GenerationConfig:
        config, left = prepare_generation_config(model, given, **arguments)
        expected, rest = GenerationMixin._prepare_generation_config(model, given, **arguments)
        assert (fields_of(config), left.keys()) == (fields_of(expected), rest.keys())
        return config

    prepared()
    model.generation_config.eos_token_id.append(7)
    assert prepared().eos_token_id == [1, 2, 7]
    model.generation_config.spec["sizes"].append(4)
    given.bad_words_ids[0].append(5)
    assert prepared().bad_words_ids == [[1, 5]]
    given.top_k = True  # equal to what it was
    assert prepared().top_k is True
    model.generation_config.temperature = 0.5
    assert prepared().temperature == 0.5
    assert prepared(attention_mask=torch.ones(2), temperature=0.7).temperature == 0.7
    for ids in ([4, 5], [6, 7], [6, 7]):
        assert prepared(eos_token_id=torch.tensor(ids)).eos_token_id.tolist() == ids


def test_a_changed_model_configuration_is_asked_again():
    model, asked = model_with(), []
    model.config._get_generation_parameters = lambda: asked.append(1) or {}
    prepare_generation_config(model, None)
    prepare_generation_config(model, None)
    assert len(asked) == 1
    model.config.max_length = 7
    prepare_generation_config(model, None)
    assert len(asked) == 2


IDS = [
    {},
    {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    {"eos_token_id": [2, 3]},
    {"eos_token_id": 2, "pad_token_id": 2, "decoder_start_token_id": 4},
    {"eos_token_id": -1},
    {"eos_token_id": torch.tensor([5, 6])},
    {"eos_token_id": 2.0},
]


@pytest.mark.parametrize("ids", IDS, ids=range(len(IDS)))
@pytest.mark.parametrize("masked, batch", [(True, 1), (True, 2), (False, 1), (False, 2), (None, None)])
def test_special_tokens_are_upstreams_in_every_call(ids, masked, batch, make_model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_model("llama")
    monkeypatch.delitem(model.__dict__, "_prepared_special_tokens", raising=False)

    def told(prepare) -> tuple:
        caplog.clear()
        config = GenerationConfig(**ids)
        prepare(config, masked, "cpu", batch)
        tensors = {name: value for name, value in vars(config).items() if name.endswith("_token_tensor")}
        said = [
            record.message for record in caplog.records if "cannot be inferred" not in record.message
        ]  # once
        return {name: str(value) for name, value in tensors.items()}, said

    upstream = partial(GenerationMixin._prepare_special_tokens, model)
    expected = told(upstream)
    assert [told(model._prepare_special_tokens) for _ in range(3)] == [expected] * 3
    other = GenerationConfig(eos_token_id=7)
    model._prepare_special_tokens(other, masked, "cpu", batch)
    assert other._eos_token_tensor.tolist() == [7]
    assert told(model._prepare_special_tokens) == expected


def test_special_tokens_are_made_once_and_follow_a_list(make_model, monkeypatch):
    model, ids = make_model("llama"), [2, 3]
    monkeypatch.delitem(model.__dict__, "_prepared_special_tokens", raising=False)

    def made() -> torch.Tensor:
        config = GenerationConfig()
        config.eos_token_id = ids
        model._prepare_special_tokens(config, True, "cpu", 1)
        return config._eos_token_tensor

    first = made()
    assert made() is first
    ids.append(4)
    assert made().tolist() == [2, 3, 4]


def test_nothing_is_shared_with_the_call():
    """What a call does to its configuration reaches neither the caller's nor the model's."""
    model = model_with(eos_token_id=[1, 2], spec={"sizes": [3]})
    given = GenerationConfig(bad_words_ids=[[1]])
    config, _ = prepare_generation_config(model, given)
    config.bad_words_ids[0].append(9)
    config.eos_token_id.append(9)
    config.spec["sizes"].append(9)
    config.max_new_tokens = 9
    assert (given.bad_words_ids, given.max_new_tokens) == ([[1]], None)
    assert (model.generation_config.eos_token_id, model.generation_config.spec) == ([1, 2], {"sizes": [3]})


def test_parts_of_a_configuration_that_are_one_stay_one():
    ids = [1, 2]
    config, _ = prepare_generation_config(
        model_with(), GenerationConfig(eos_token_id=ids, suppress_tokens=ids)
    )
    assert config.eos_token_id is config.suppress_tokens
    assert config.eos_token_id is not ids


@pytest.mark.parametrize(
    "more", [{"max_new_tokens": 0}, {"early_stopping": "perhaps"}, {"num_return_sequences": 2}], ids=str
)
def test_a_wrong_value_is_upstreams_error(more):
    messages = []
    for prepare in (prepare_generation_config, GenerationMixin._prepare_generation_config):
        with pytest.raises(ValueError, match=next(iter(more))) as error:
            prepare(model_with(), GenerationConfig(), **more)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_upstreams_preparation_reads_what_it_is_given():
    """Revisit `configuration_utils.py` when this fails: upstream's method has come to need more of a model."""
    source = inspect.getsource(GenerationMixin._prepare_generation_config)
    assert set(re.findall(r"self\.(\w+)", source)) == {"config", "generation_config"}
    assert list(inspect.signature(GenerationMixin._prepare_generation_config).parameters) == [
        "self",
        "generation_config",
        "kwargs",
    ]
