"""Chooses the draft tree anew for this device: measures a decode step with several trees and keeps the fastest.

    python tune_spec_stream.py --model_name_or_path checkpoints/spec_stream_9m --batch_size 1,8

What a tree yields is known from calibration; what a step costs is known only where it runs. The choice goes to the checkpoint's
`generation_config.json`, where decoding on this device looks for it; weights are not touched. Plain decoding is a choice, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark import checkpoint as checkpoints
from benchmark.config import DTYPES, SHIPPED_CHECKPOINT
from benchmark.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RunError, UsageError
from benchmark.files import read_json, write_json
from benchmark.flags import Parser
from benchmark.hub_checkpoint import fetch
from models import fold

if TYPE_CHECKING:
    from huggingface.transformers.generation.tree_tuning import Tuning

ROOT = Path(__file__).resolve().parent
CONFIG_FILE = "generation_config.json"
EXIT_CODES = """exit codes: 0 done; 1 the checkpoint cannot be loaded or written; 2 bad arguments, or a checkpoint without
streams; 130 interrupted, batch sizes that were not yet printed as saved are not"""


@dataclass(frozen=True)
class Request:
    """The flags of one call; `sizes` is None for those that suit the device."""

    model_name_or_path: str
    device: str
    dtype: str
    batch_size: tuple[int, ...]
    context: int
    sizes: tuple[int, ...] | None
    save: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one call and returns its exit code."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except (RunError, ValueError, OSError, MemoryError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; what is printed as saved is saved.", EXIT_INTERRUPTED)


def parse(argv: Sequence[str]) -> Request:
    """Returns the flags of a command line; `-` and `_` are the same in a flag.

    Raises:
        UsageError: an unknown flag, or a value out of range.
    """
    parser = Parser(
        prog="tune_spec_stream.py",
        description="Choose the draft tree for this device, from measured steps.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model_name_or_path",
        default=SHIPPED_CHECKPOINT,
        help="checkpoint with streams; a hub id needs --no-save [%(default)s]",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="auto: float32 on CPU, bfloat16 on CUDA"
    )
    parser.add_argument(
        "--batch_size",
        default="1",
        help="sequences decoded at once, a comma list; each is tuned as the next power of two [1]",
    )
    parser.add_argument(
        "--context", default="256", help="tokens before the step, cut to the model's positions [256]"
    )
    parser.add_argument("--sizes", help="numbers of nodes to try, a comma list [those that suit the device]")
    parser.add_argument(
        "--save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"write the choice to the checkpoint's {CONFIG_FILE} [on]",
    )
    given = parser.values([_normal(word) for word in argv])
    given["context"] = _whole_number("context", given["context"])
    for name in ("batch_size", "sizes"):
        if given[name] is not None:
            given[name] = tuple(sorted({_whole_number(name, part) for part in given[name].split(",")}))
    return Request(**given)


def _normal(word: str) -> str:
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or flag == "--no-save":
        return word
    return "--" + flag[2:].replace("-", "_").replace("no_save", "no-save") + equals + value


def _whole_number(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"--{name} got '{text}', expected whole numbers of 1 or more.")
    return number


def run(request: Request) -> int:
    """Checks, loads, tunes, saves and prints as asked; returns the exit code."""
    folder = find_checkpoint(request)
    for tuning in measure(request, folder):
        sys.stdout.write(table(tuning, request.model_name_or_path))
        if request.save:
            save(folder / CONFIG_FILE, tuning)
            sys.stdout.write(f"saved to {folder / CONFIG_FILE}\n")
        sys.stdout.flush()
    return EXIT_DONE


def find_checkpoint(request: Request) -> Path:
    """Returns the checkpoint's folder after all that can be told without loading it.

    Raises:
        UsageError: there is none, it has no streams, or the result could not be saved in it.
        RunError: it is unsafe, incomplete or corrupt.
    """
    name = request.model_name_or_path
    local = checkpoints.locate(name, ROOT)
    if local is None and request.save:
        raise UsageError(f"--model_name_or_path {name} is a hub id: give a local copy, or add --no-save.")
    folder = local or fetch(name)
    if not checkpoints.inspect(folder).config.get("streams"):
        raise UsageError(
            f"{name} has no streams; train them: train_spec_stream.py --mode adapter --model_name_or_path {name}"
        )
    if request.save and not (folder / CONFIG_FILE).is_file():
        raise UsageError(
            f"{folder} has no {CONFIG_FILE} to save into; save the model again, or add --no-save."
        )
    if request.save and not os.access(folder, os.W_OK):
        raise UsageError(f"{folder} cannot be written; give a copy that can, or add --no-save.")
    return folder


def measure(request: Request, folder: Path) -> Iterator[Tuning]:
    """Loads the model and yields what tuning found for each batch size.

    Raises:
        UsageError: there is no such device.
        ValueError: the checkpoint cannot be loaded, or no step can have one of the sizes.
        MemoryError: not even plain decoding fits the device's memory.
    """
    from torch import OutOfMemoryError

    from benchmark import machine
    from huggingface.transformers.generation.tree_tuning import batch_class, tune
    from models.loading import load

    here = machine.describe(request.device)
    recipe = fold("spec_stream", {"dtype": request.dtype}, here)
    model = load(recipe, folder, here["device"]).model
    for batch in sorted({batch_class(size) for size in request.batch_size}):
        try:
            yield tune(model, request.sizes, request.context, batch)
        except OutOfMemoryError as error:
            raise MemoryError(
                f"plain decoding of {batch} sequences after {request.context} tokens exceeds the device's memory; "
                "use a smaller --batch_size or --context."
            ) from error


def table(tuning: Tuning, name: str) -> str:
    """Returns what was measured, one line a candidate, the chosen one marked."""
    lines = [
        f"{name} on {tuning.setting}; steps after {tuning.context} tokens, batch {tuning.batch}",
        f"{'nodes':>6}  {'streams':>7}  {'carriers':>8}  {'beam':>4}  {'step ms':>9}  {'tokens/step':>11}  {'tokens/s':>9}",
    ]
    for one in tuning.candidates:
        shape, beam = one.plan.shape, one.plan.beam or "-"
        mark = "  <- chosen" if one is tuning.chosen else ""
        lines.append(
            f"{shape.nodes:>6}  {shape.streams:>7}  {one.plan.carriers or shape.nodes:>8}  {beam:>4}  {1000 * one.step_s:>9.3f}  "
            f"{one.tokens_per_step:>11.2f}  {tuning.batch * one.speed:>9.1f}{mark}"
        )
    return "\n".join([*lines, *_notes(tuning)]) + "\n"


def _notes(tuning: Tuning) -> list[str]:
    notes = [
        "tokens/step and tokens/s: expected, from the calibrated accuracies; tokens/s of the whole batch."
    ]
    if any(one.plan.beam is not None for one in tuning.candidates):
        notes.append(
            "carriers: nodes with streams, the likeliest; beam: trees are grown in each step, which yields at least what is "
            "expected; 1 is a chain."
        )
    if tuning.nodes == 1:
        notes.append("1 node: nothing is drafted, plain decoding is as fast.")
    return notes


def save(file: Path, tuning: Tuning) -> None:
    """Adds the choice to a checkpoint's generation configuration, which is replaced as a whole or not at all."""
    from huggingface.transformers.generation.draft_settings import CONFIG_KEY

    values: dict[str, Any] = read_json(file) or {}
    settings = values.get(CONFIG_KEY) or {}
    nodes = {**(settings.get("draft_nodes") or {}), tuning.setting: tuning.entry}
    values[CONFIG_KEY] = {**settings, "draft_nodes": nodes}
    # With this mark upstream drops every key that it does not know.
    values.pop("_from_model_config", None)
    write_json(file, values)


def _fail(message: object, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
