"""Every option of a benchmark run, written once: the flags, their help and the saved `config.json` come from here."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmark.errors import UsageError

SHIPPED_CHECKPOINT = "checkpoints/spec_stream_9m"
DTYPES = ("auto", "float32", "float16", "bfloat16")
ON_LONG = ("truncate_left", "skip", "error")
WIKITEXT2, REFERENCES = "wikitext2", "references"
MOST_DRAFT_NODES = 1024  # far beyond what pays; a tree's mask and its growth take the square of its nodes
PLACE_FIELDS = ("output_dir", "run_name", "resume", "overwrite", "timeout_s")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def _is_off(text: str) -> bool:
    return text.lower() in ("off", "none", "false", "")


def _ratios(text: str) -> tuple[float, ...]:
    return () if _is_off(text) else tuple(float(part) for part in _names(text))


def _texts(text: str) -> tuple[str, ...]:
    return () if _is_off(text) else _names(text)


def _auto_or_number(text: str) -> int | str:
    return "auto" if text == "auto" else int(text)


def option(
    default: Any,
    text: str,
    read: Callable[[str], Any] = str,
    shape: str = "TEXT",
    choices: tuple[str, ...] = (),
    alias: str | None = None,
) -> Any:
    """Returns a dataclass field that is also a flag.

    Args:
        default: value when neither the command line nor the YAML file gives one.
        text: help of the flag.
        read: turns the flag's text into the value; `ValueError` means the text is not of that shape.
        shape: what `read` expects, in words, for help and messages.
        choices: the only values allowed, empty for any.
        alias: a second name of the flag.
    """
    return field(
        default=default, metadata=dict(help=text, read=read, shape=shape, choices=choices, alias=alias)
    )


@dataclass(frozen=True)
class RunConfig:
    """Options of one run. Each field is the flag of the same name; values are checked on construction.

    Raises:
        UsageError: a value outside its range, or flags that contradict each other.
    """

    model_type: tuple[str, ...] = option(
        ("spec_stream",), "techniques: a name, a comma list or 'all'; '+' combines; the first is the baseline", _names,
        "NAME[,NAME...]",
    )  # fmt: skip
    model_name_or_path: str = option(SHIPPED_CHECKPOINT, "checkpoint: a directory or a hub id", shape="PATH")
    random_weights: bool = option(
        False, "use random weights: a config.json is enough, and every result says so"
    )
    assistant_model: str | None = option(None, "draft model of the technique 'assisted'", shape="PATH")
    datasets: tuple[str, ...] = option(
        ("spider", "dialogsum", "e2e_nlg"), "data sets, a comma list; 'synthetic' gives random prompts", _names,
        "NAME[,NAME...]",
    )  # fmt: skip
    data_dir: str | None = option(
        None, "folder with the official release files; for 'jsonl' alone a file", shape="PATH"
    )
    limit: int = option(32, "prompts per data set, drawn with --seed", int, "N", alias="sample_size")
    prompt_tokens: int = option(128, "length of the prompts of the data set 'synthetic'", int, "N")
    ignore_eos: bool = option(False, "go on to --max_new_tokens even after the end-of-text token")
    batch_size: tuple[int, ...] = option(
        (1,), "prompts answered at once, a comma list", _whole_numbers, "N[,N...]"
    )
    max_new_tokens: int = option(256, "most tokens of an answer", int, "N")
    on_long: str = option(
        "truncate_left", "what to do with a prompt beyond the model's positions", choices=ON_LONG
    )
    attn_implementation: str = option(
        "auto", "attention of techniques that do not decide it themselves", shape="NAME"
    )
    num_runs: int = option(3, "repeats of every prompt; the median is reported", int, "N")
    warmup: int = option(1, "untimed answers of each technique before its first timed one", int, "N")
    seed: int = option(0, "seed of the prompt sample, of sampling and of the bootstrap", int, "N")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", float, "X")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 is off", int, "N")
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability", float, "X")
    acceptance_sweep: tuple[float, ...] = option(
        (), "acceptance ratios, 0 to 1, at which to measure the drafting techniques", _ratios, "off|X[,X...]"
    )
    draft_nodes: int | str = option(
        "auto", "nodes of the draft tree; auto takes the tuned number", _auto_or_number, "auto|N"
    )
    dtype: str = option("auto", "auto: float32 on CPU, bfloat16 on CUDA", choices=DTYPES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", shape="NAME")
    breakdown: bool = option(True, "measure the phases of a step in a run of their own")
    perplexity: tuple[str, ...] = option(
        (), "texts whose perplexity is a quality column: wikitext2 (--data_dir, hub or own sample), references", _texts,
        "off|NAME[,NAME]",
    )  # fmt: skip
    perplexity_window: int | str = option(
        "auto", "tokens of a window of wikitext2; auto: the model's positions, at most 2048", _auto_or_number, "auto|N"
    )  # fmt: skip
    perplexity_stride: int | str = option(
        "auto", "tokens from one window to the next; auto: half a window", _auto_or_number, "auto|N"
    )
    perplexity_tokens: int = option(32768, "tokens of wikitext2 that are read; 0 is all", int, "N")
    timeout_s: float = option(600.0, "seconds after which one answer counts as hung", float, "X")
    output_dir: str = option("results", "folder of the run directories", shape="PATH")
    run_name: str | None = option(None, "name of the run directory; default: date and hash of the options")
    resume: bool = option(True, "go on where an earlier run of the same name stopped")
    overwrite: bool = option(False, "delete the results of an earlier run of the same name")
    technique_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_lists()
        for item in fields(self):
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                _refuse(item.name, getattr(self, item.name), f"one of {', '.join(choices)}")
        for name, least in {
            "limit": 1,
            "prompt_tokens": 1,
            "max_new_tokens": 0,
            "num_runs": 1,
            "warmup": 0,
            "perplexity_tokens": 0,
        }.items():
            _at_least(name, getattr(self, name), least)
        self._check_sampling()
        self._check_perplexity()
        if self.draft_nodes != "auto" and not 1 <= int(self.draft_nodes) <= MOST_DRAFT_NODES:
            _refuse("draft_nodes", self.draft_nodes, f"auto or a number from 1 to {MOST_DRAFT_NODES}")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            _refuse("timeout_s", self.timeout_s, "a number above 0")
        self._check_places()

    def _check_lists(self) -> None:
        for name in ("model_type", "datasets", "batch_size", "perplexity", "acceptance_sweep"):
            values = getattr(self, name)
            if not values and name not in ("perplexity", "acceptance_sweep"):
                _refuse(name, "nothing", "at least one value")
            # Parts of a technique are the same in any order.
            if len({"+".join(sorted(str(value).split("+"))) for value in values}) < len(values):
                _refuse(name, ",".join(map(str, values)), "each value once")
        for size in self.batch_size:
            _at_least("batch_size", size, 1)
        for ratio in self.acceptance_sweep:
            if not 0.0 <= ratio <= 1.0:
                _refuse("acceptance_sweep", ratio, "ratios from 0 to 1")

    def _check_sampling(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            _refuse("temperature", self.temperature, "0 (greedy) or a number above 0")
        _at_least("top_k", self.top_k, 0)
        if not 0.0 < self.top_p <= 1.0:
            _refuse("top_p", self.top_p, "a number above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            _refuse("seed", self.seed, "a whole number from 0 to 2**63 - 1")
        if self.temperature == 0 and (self.top_k or self.top_p < 1.0):
            raise UsageError(
                "--top_k and --top_p need sampling: add --temperature above 0, or leave them out."
            )
        if self.temperature > 0 and self.acceptance_sweep:
            raise UsageError(
                "--acceptance_sweep needs greedy decoding: leave out --temperature, or the sweep."
            )

    def _check_perplexity(self) -> None:
        for name in self.perplexity:
            if name not in (WIKITEXT2, REFERENCES):
                _refuse("perplexity", name, f"some of {WIKITEXT2}, {REFERENCES}, or off")
        for item in fields(self):
            given = getattr(self, item.name) != item.default
            if item.name.startswith("perplexity_") and given and WIKITEXT2 not in self.perplexity:
                raise UsageError(f"--{item.name} has no text to go by: add --perplexity {WIKITEXT2}.")
        window, stride = self.perplexity_window, self.perplexity_stride
        if window != "auto":
            _at_least("perplexity_window", int(window), 2)
        if stride != "auto":
            _at_least("perplexity_stride", int(stride), 1)

    def _check_places(self) -> None:
        check_device(self.device)
        if self.run_name is not None and (
            not self.run_name or self.run_name in (".", "..") or Path(self.run_name).name != self.run_name
            or not self.run_name.isprintable()
        ):  # fmt: skip
            _refuse("run_name", self.run_name, "a plain folder name without '/'")

    def decides_results(self) -> dict[str, Any]:
        """Returns the options that change what is measured: all but where results go and how long to wait."""
        return {name: value for name, value in self.as_json().items() if name not in PLACE_FIELDS}

    def as_json(self) -> dict[str, Any]:
        """Returns all options as JSON types, those of techniques among them."""
        values = asdict(self)
        values |= values.pop("technique_options")
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_device(name: str) -> None:
    """Raises UsageError for a device's name that is none; whether the device is there is not asked."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name):
        _refuse("device", name, "auto, cpu, cuda or cuda:N")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        _refuse(name, value, f"{least} or more")


def _refuse(name: str, value: Any, expected: str) -> None:
    raise UsageError(f"--{name} got {value}, expected {expected}.")
