"""A loader without torch: answers follow from the prompt alone, and faults are ordered through a file.

`FAKE_FAULTS` names a JSON file: technique's recipe decoder+drafts -> fault -> list of request numbers, counted over all
processes in a file beside it. Faults: `die`, `hang`, `oom`, `full`, `device`, `error`, `refuse` (at load).
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

from models.answer import Generation, Limits, Perplexity, Scores

__all__ = ["Limits", "load"]
MODEL_S = {"stock": 2e-3, "engine": 1e-3}


class OutOfMemoryError(RuntimeError):
    pass


def describe_machine(device):
    if device not in ("auto", "cpu"):
        raise ValueError(f"--device {device}: this machine has 0 CUDA devices; use --device cpu.")
    free = int(os.environ.get("FAKE_FREE_BYTES", 64 << 30))
    return {
        "device": "cpu",
        "device_name": "fake",
        "capability": None,
        "free_bytes": free,
        "cuda": None,
        "pid": os.getpid(),
    }


def load(recipe, checkpoint, device, *, assistant, draft_nodes, random_weights):
    print("a library that prints on stdout")  # noqa: T201 - must not reach the protocol
    model = FakeModel(recipe)
    if recipe["drafts"] == "assistant":
        model.weight_bytes += len(Path(assistant, "config.json").read_bytes())
    model.fault("load")
    return model


class Letters:
    def encode(self, text):
        return [ord(letter) % 97 for letter in text]


class FakeModel:
    fallbacks = ()
    weight_bytes = 1000
    kv_bytes = 10

    def __init__(self, recipe):
        self.recipe = recipe
        self.dtype = recipe["dtype"]
        self.draft_nodes, self.draft_source = (3, "tuned") if recipe["drafts"] else (None, None)
        graphs = recipe["decoder"] == "engine"
        self.runner, self.capture_s, self.capture_bytes = ("cuda graph", 0.5, 64) if graphs else (None,) * 3
        self.name = f"{recipe['decoder']}:{recipe['drafts'] or 'none'}"
        self.tokenizer = Letters()

    def fault(self, op):
        place = os.environ.get("FAKE_FAULTS")
        if not place:
            return
        counter = Path(place).with_suffix(f".{self.name.replace(':', '_')}.{op}")
        number = len(counter.read_bytes()) if counter.exists() else 0
        with counter.open("ab") as file:
            file.write(b".")
        for kind, numbers in json.loads(Path(place).read_text()).get(f"{self.name}/{op}", {}).items():
            if number in numbers:
                getattr(self, f"_{kind}")()

    def _die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def _hang(self):
        time.sleep(600)

    def _oom(self):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def _full(self):
        raise MemoryError(
            "the KV cache of 2 prompts needs 9 bytes (0.0 GiB), and 3 (0.0 GiB) are free on cuda."
        )

    def _device(self):
        raise RuntimeError("CUDA error: device-side assert triggered")

    def _error(self):
        raise ValueError("this technique cannot do that; use another.")

    def generate(self, prompts, limits, *, record_phases=False, acceptance_ratio=None):
        self.fault("generate")
        time.sleep(float(os.environ.get("FAKE_DELAY", 0)))
        return [self._answer(prompt, limits, record_phases) for prompt in prompts]

    def _answer(self, prompt, limits, record_phases):
        if prompt == "unusable":
            return Generation.failed("the prompt is unusable.")
        tokens = answer_of(prompt)[: limits.max_new_tokens]
        if not tokens:
            return Generation([], "", 1, None, 0.0, [], "length")
        if os.environ.get("FAKE_DIFFERS") == self.name and len(tokens) > 2:
            tokens[2] += 1
        a_step = 3 if self.recipe["drafts"] else 1
        steps = [
            {
                "emitted": min(a_step, len(tokens) - start),
                "accepted": min(a_step, len(tokens) - start) - 1,
                "nodes": a_step - 1,
            }
            for start in range(1, len(tokens), a_step)
        ]
        seconds = MODEL_S[self.recipe["decoder"]]
        return Generation(
            token_ids=tokens,
            text=" " + " ".join(f"w{token}" for token in tokens),
            prompt_tokens=len(prompt),
            ttft_s=seconds,
            total_s=seconds * (1 + len(steps)),
            steps=steps,
            finish_reason="eos",
            phases_s={"prefill": seconds, "forward": seconds * len(steps)} if record_phases else None,
        )

    def score(self, prompt, token_ids, limits=None):
        return Scores([-0.5] * len(token_ids), [0.25] * len(token_ids), [0.0] * len(token_ids))

    def text_perplexity(self, text, window=None, stride=None, tokens=0):
        self.fault("perplexity")
        return Perplexity(float(len(text)), 1.0, tokens, window, stride)

    def reference_perplexity(self, pairs):
        self.fault("perplexity")
        return Perplexity(float(len(pairs)), 1.0, sum(len(text) for _, text in pairs))


def answer_of(prompt):
    digest = hashlib.sha256(str(prompt).encode()).digest()
    return list(digest[: 5 + digest[0] % 8])
