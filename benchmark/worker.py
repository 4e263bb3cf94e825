"""A worker process: loads one technique and answers requests, one JSON object a line, until its input ends.

Requests come on stdin as `{"id": n, "op": name, ...}`; answers go to the stdout the process was born with as
`{"id": n, "ok": true, ...}` or `{"id": n, "ok": false, "kind": ..., "message": ...}`. Everything that libraries print
goes to stderr instead, which the parent keeps in a log, so that no stray line can pass for an answer.

    machine   {device}                                                -> what the device is, what is installed
    load      {recipe, checkpoint, device, assistant, draft_nodes, random_weights} -> dtype, weight_bytes, load_s, ...
    generate  {prompts, limits, prompt_tokens, record_phases, acceptance_ratio} -> generations, wall_s, memory
    score     {prompt, token_ids, limits, prompt_tokens}              -> margins, gaps, logprobs of those tokens
    text_perplexity       {text, window, stride, tokens}              -> perplexity, nll, tokens, window, stride
    reference_perplexity  {pairs}                                     -> perplexity, nll, tokens, skipped

`kind` is `oom`, `device` (after either the parent ends the process: a device may be unusable), or `error`.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, TextIO

from benchmark.redaction import Redacted, redact

Clock = Callable[[], float]
PR_SET_PDEATHSIG = 1
OOM_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator")
DEVICE_WORDS = ("device-side assert", "cuda error", "illegal memory access", "cudnn_status", "nccl error")


class Session:
    """Answers the requests of one process.

    Args:
        loader: module with `Limits` and `load(recipe, checkpoint, device, ...)`; may bring its own `describe_machine(device)`.
        clock: seconds on a monotonic clock.
    """

    def __init__(self, loader: Any, clock: Clock = time.perf_counter) -> None:
        self.loader = loader
        self.clock = clock
        self.model: Any = None

    def answer(self, op: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the answer to one request."""
        operations: dict[str, Callable[..., dict[str, Any]]] = {
            "machine": self.machine,
            "load": self.load,
            "generate": self.generate,
            "score": self.score,
            "text_perplexity": self.text_perplexity,
            "reference_perplexity": self.reference_perplexity,
        }
        return operations[op](**request)

    def machine(self, device: str) -> dict[str, Any]:
        """Returns what the device is and what is installed, as `benchmark.machine` describes it."""
        from benchmark import machine

        return getattr(self.loader, "describe_machine", machine.describe)(device)

    def load(self, recipe: dict[str, Any], checkpoint: str, device: str, **options: Any) -> dict[str, Any]:
        """Loads the technique that this process measures."""
        select_device(device)
        start = self.clock()
        self.model = self.loader.load(recipe, checkpoint, device, **options)
        synchronise()
        facts = {name: getattr(self.model, name, None) for name in ("dtype", "weight_bytes", "fallbacks")}
        return {name: _plain(value) for name, value in facts.items()} | {"load_s": self.clock() - start}

    def generate(
        self, prompts: list[str], limits: dict[str, Any], prompt_tokens: int | None = None, **how: Any
    ) -> dict[str, Any]:
        """Answers prompts in one request, timed from submission to the last token, the device idle at both edges.

        Args:
            prompts: texts.
            limits: fields of the loader's `Limits`.
            prompt_tokens: cut each prompt to exactly so many tokens.
            **how: what else `LoadedModel.generate` takes.
        """
        inputs: list[Any] = list(prompts)
        if prompt_tokens is not None:
            inputs = [list(self.model.tokenizer.encode(text))[:prompt_tokens] for text in prompts]
        reset_peak_memory()
        synchronise()
        start = self.clock()
        generations = self.model.generate(inputs, self.loader.Limits(**limits), **how)
        synchronise()
        wall_s = self.clock() - start
        return {
            "wall_s": wall_s,
            "peak_memory_bytes": peak_memory(),
            "kv_bytes": _plain(getattr(self.model, "kv_bytes", None)),
            "draft_nodes": _plain(getattr(self.model, "draft_nodes", None)),
            "draft_source": _plain(getattr(self.model, "draft_source", None)),
            "runner": _plain(getattr(self.model, "runner", None)),
            "capture_s": _plain(getattr(self.model, "capture_s", None)),
            "capture_bytes": _plain(getattr(self.model, "capture_bytes", None)),
            "generations": [_fields(generation) for generation in generations],
        }

    def score(
        self, prompt: str, token_ids: list[int], limits: dict[str, Any], prompt_tokens: int | None = None
    ) -> dict[str, Any]:
        """Scores given tokens teacher-forced, the prompt cut as it was when they were generated."""
        text: Any = prompt
        if prompt_tokens is not None:
            text = list(self.model.tokenizer.encode(prompt))[:prompt_tokens]
        return _fields(self.model.score(text, token_ids, self.loader.Limits(**limits)))

    def text_perplexity(self, **request: Any) -> dict[str, Any]:
        """Says how well the technique's own weights predict a running text."""
        return _fields(self.model.text_perplexity(**request))

    def reference_perplexity(self, pairs: list[list[str]]) -> dict[str, Any]:
        """Says how well they predict the texts that follow prompts."""
        return _fields(self.model.reference_perplexity(pairs))


def serve(session: Session, requests: Iterable[bytes], reply: BinaryIO) -> None:
    """Answers requests until they end; an error is an answer too."""
    for line in requests:
        request = json.loads(line)
        number, op = request.pop("id"), request.pop("op")
        try:
            answer = {"id": number, "ok": True} | session.answer(op, request)
        except Exception as error:  # noqa: BLE001 - whatever a technique raises costs its cell, not the run
            traceback.print_exc()
            answer = {"id": number, "ok": False, "kind": kind_of(error), "message": describe(error)}
        reply.write(json.dumps(answer).encode() + b"\n")
        reply.flush()


def kind_of(error: BaseException) -> str:
    """Returns `oom`, `device` or `error`, judged by type name and words so that no framework is imported for it."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "oom"
    if isinstance(error, RuntimeError) and any(words in text for words in OOM_WORDS):
        return "oom"
    if type(error).__name__ == "AcceleratorError" or any(words in text for words in DEVICE_WORDS):
        return "device"
    return "error"


def describe(error: BaseException) -> str:
    """Returns an error in one line, without secrets."""
    text = " ".join(str(error).split())
    plain = isinstance(error, (ValueError, MemoryError)) and text
    return redact(text if plain else f"{type(error).__name__}: {text}".rstrip(": "))[:2000]


def select_device(device: str) -> None:
    """Makes `cuda:N` the device that the functions below mean."""
    if device.startswith("cuda:"):
        import torch

        torch.cuda.set_device(device)


def synchronise() -> None:
    """Waits until the device has done all it was given. Does nothing where torch was never imported, as in tests."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    """Starts the device's memory high-water mark afresh."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Returns the highest memory in bytes: the device's since the last reset, or this process's on a CPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fields(value: Any) -> dict[str, Any]:
    names = getattr(value, "__dataclass_fields__", None)
    pairs = value.items() if names is None else ((name, getattr(value, name)) for name in names)
    return {name: _plain(item) for name, item in pairs}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return _fields(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else str(value)


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


@contextlib.contextmanager
def private_stdout() -> Any:
    """Yields the original stdout for answers alone; inside, descriptor 1 and `print` lead to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.set_inheritable(answers.fileno(), False)
    os.dup2(2, 1)
    out, err = sys.stdout, sys.stderr
    redacted: TextIO = Redacted(err)  # type: ignore[assignment]  # passes on what prints and logs call, no more
    sys.stdout = sys.stderr = redacted
    try:
        yield answers
    finally:
        sys.stdout, sys.stderr = out, err
        answers.close()


def main(argv: list[str] | None = None) -> None:
    """Serves the parent process."""
    flags = argparse.ArgumentParser(prog="benchmark.worker")
    flags.add_argument("--parent", type=int, required=True)
    flags.add_argument("--loader", required=True)
    options = flags.parse_args(argv)
    die_with(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    with private_stdout() as answers:
        faulthandler.enable(file=2)
        faulthandler.register(
            signal.SIGUSR1, file=2, all_threads=True
        )  # the parent asks for stacks before it kills
        serve(Session(importlib.import_module(options.loader)), sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
