import io
import json
import os
import signal
import time

import pytest

from benchmark.worker import Session, describe, kind_of, serve
from benchmark.worker_client import Worker, WorkerError
from tests.benchmark import fake_loader

LOADER = "tests.benchmark.fake_loader"
RECIPE = {"decoder": "engine", "drafts": "streams", "dtype": "float32"}
LIMITS = {"max_new_tokens": 8, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "ignore_eos": False, "seed": 0}
LOAD = {
    "recipe": RECIPE,
    "checkpoint": "none",
    "device": "cpu",
    "assistant": None,
    "draft_nodes": "auto",
    "random_weights": False,
}


@pytest.fixture
def worker(tmp_path):
    worker = Worker("spec_stream", LOADER, tmp_path / "worker.log")
    yield worker
    worker.kill()


def gone(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


class Clock:
    """Each look takes a second."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_a_request_is_timed_by_the_worker_s_clock_around_generate_alone():
    session = Session(fake_loader, Clock())
    assert session.load(**LOAD)["load_s"] == 1.0
    answer = session.generate(["a prompt"], LIMITS)
    assert answer["wall_s"] == 1.0
    assert (answer["draft_nodes"], answer["draft_source"]) == (3, "tuned")
    assert (answer["runner"], answer["capture_s"], answer["capture_bytes"]) == ("cuda graph", 0.5, 64)
    assert session.clock() == 5.0  # two looks to load, two to generate, this one


def test_prompts_are_cut_to_their_number_of_tokens():
    session = Session(fake_loader)
    session.load(**LOAD)
    (cut,) = session.generate(["abcdef"], LIMITS, prompt_tokens=4)["generations"]
    assert cut["prompt_tokens"] == 4


def test_an_error_is_an_answer_and_the_next_request_is_served():
    requests = [{"id": 1, "op": "nonsense"}, {"id": 2, "op": "machine", "device": "cpu"}]
    reply = io.BytesIO()
    serve(Session(fake_loader), [json.dumps(item).encode() for item in requests], reply)
    first, second = map(json.loads, reply.getvalue().splitlines())
    assert (first["ok"], first["kind"], second["ok"]) == (False, "error", True)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (fake_loader.OutOfMemoryError("x"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom"),
        (RuntimeError("CUDA error: device-side assert triggered"), "device"),
        (ValueError("out of memory is a word here"), "error"),
        (KeyError("x"), "error"),
    ],
)
def test_kinds_of_errors(error, kind):
    assert kind_of(error) == kind


def test_messages_are_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "topsecrettoken")
    assert describe(ValueError("two\nlines topsecrettoken")) == "two lines <redacted>"
    assert describe(KeyError("x")) == "KeyError: 'x'"
    assert describe(MemoryError("9 bytes needed")) == "9 bytes needed"
    assert describe(MemoryError()) == "MemoryError"


def test_stray_prints_go_to_the_log(worker):
    assert worker.ask("load", 30, **LOAD)["dtype"] == "float32"
    assert len(worker.ask("generate", 30, prompts=["a", "b"], limits=LIMITS)["generations"]) == 2
    assert "a library that prints" in worker.log.read_text()


def test_a_killed_worker_is_reported_at_once(worker):
    worker.ask("load", 30, **LOAD)
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="killed by SIGKILL") as caught:
        worker.ask("generate", 30, prompts=["a"], limits=LIMITS)
    assert (caught.value.kind, caught.value.status, caught.value.fatal) == ("died", "error", True)


def test_a_hang_is_dumped_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmark.worker_client.DUMP_S", 0.3)
    faults = tmp_path / "faults.json"
    faults.write_text('{"engine:streams/generate": {"hang": [0]}}')
    monkeypatch.setenv("FAKE_FAULTS", str(faults))
    worker = Worker("spec_stream", LOADER, tmp_path / "worker.log")
    worker.ask("load", 30, **LOAD)
    with pytest.raises(WorkerError, match=r"no answer within 0\.5 s") as caught:
        worker.ask("generate", 0.5, prompts=["a"], limits=LIMITS)
    assert caught.value.status == "timeout"
    assert "in _hang" in worker.log.read_text()
    assert gone(worker.process.pid)


def test_large_requests_and_answers_pass(worker):
    worker.ask("load", 30, **LOAD)
    text = "long " * 400_000
    (answer,) = worker.ask("generate", 60, prompts=[text], limits=LIMITS)["generations"]
    assert answer["prompt_tokens"] == len(text)


def test_an_unknown_loader_is_reported(tmp_path):
    worker = Worker("x", "no.such.module", tmp_path / "worker.log")
    with pytest.raises(WorkerError, match="exit code 1"):
        worker.ask("machine", 30, device="cpu")
    assert "ModuleNotFoundError" in worker.log.read_text()


def test_perplexities_are_answered_as_plain_numbers():
    session = Session(fake_loader)
    session.load(**LOAD)
    answer = session.answer("text_perplexity", {"text": "abc", "window": 8, "stride": 4, "tokens": 2})
    assert answer == {"perplexity": 3.0, "nll": 1.0, "tokens": 2, "window": 8, "stride": 4, "skipped": 0}
    answer = session.answer("reference_perplexity", {"pairs": [["a", " b"], ["c", " de"]]})
    assert (answer["perplexity"], answer["tokens"]) == (2.0, 5)
