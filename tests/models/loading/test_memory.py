"""A cache that cannot fit is refused before anything is allocated, with both numbers."""

import pytest
import torch

from benchmark.worker import describe, kind_of
from huggingface.transformers.cache_utils import StaticTreeCache
from models import Limits
from models.loading import memory
from tests.models.loaders import PROMPT, loaded


@pytest.fixture
def short_of_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)


def test_the_bytes_told_are_those_that_will_be_taken(stream_checkpoint):
    model = loaded("spec_stream", stream_checkpoint).model
    shape = {"batch": 3, "capacity": 70, "scratch": 25}
    assert memory.cache_bytes(model, **shape) == StaticTreeCache.for_model(model, **shape).nbytes() > 0


def test_a_cpu_is_not_asked(stream_checkpoint):
    assert memory.free_bytes(torch.device("cpu")) is None
    memory.check_fits(loaded("static", stream_checkpoint).model, 1 << 40, 1 << 20, 1)


@pytest.mark.parametrize("name", ["static", "spec_stream"])
def test_a_batch_that_cannot_fit_ends_its_cell_before_decoding(name, stream_checkpoint, short_of_memory):
    model = loaded(name, stream_checkpoint)
    model.model.generate = lambda *_, **__: pytest.fail("decoding began")
    with pytest.raises(
        MemoryError, match=r"of 2 prompts needs \d+ bytes .* and 1000 .*--batch_size"
    ) as caught:
        model.generate([PROMPT, "b"], Limits(max_new_tokens=20))
    assert kind_of(caught.value) == "oom"
    assert describe(caught.value).startswith("the KV cache of 2 prompts")


def test_what_fits_runs(stream_checkpoint, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 30)
    assert loaded("static", stream_checkpoint).generate([PROMPT], Limits(max_new_tokens=2))[0].error is None


def test_upstreams_cache_grows_and_is_not_asked(stream_checkpoint, short_of_memory):
    assert loaded("kv_cache", stream_checkpoint).generate([PROMPT], Limits(max_new_tokens=2))[0].error is None
