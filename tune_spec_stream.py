"""Chooses the draft tree anew for this device: measures a decode step with trees of several sizes and keeps the fastest.

    python tune_spec_stream.py --model_name_or_path checkpoints/spec_stream_9m

What a tree yields is known from calibration; what a step costs is known only where it runs. The chosen size goes to the
checkpoint's `generation_config.json`, where decoding on this device looks for it; weights are not touched.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from benchmark import checkpoint as checkpoints
from benchmark.config import DTYPES, SHIPPED_CHECKPOINT
from benchmark.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RunError, UsageError
from benchmark.files import read_json, write_json
from benchmark.hub_checkpoint import fetch
from models import fold

if TYPE_CHECKING:
    from huggingface.transformers.generation.tree_tuning import Tuning

ROOT = Path(__file__).resolve().parent
CONFIG_FILE = "generation_config.json"
EXIT_CODES = """exit codes: 0 done; 1 the checkpoint cannot be loaded or written; 2 bad arguments, or a checkpoint without
streams; 130 interrupted, nothing was saved"""


@dataclass(frozen=True)
class Request:
    """The flags of one call; `sizes` is None for those that suit the device."""

    model_name_or_path: str
    device: str
    dtype: str
    batch_size: int
    context: int
    sizes: tuple[int, ...] | None
    save: bool


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one call and returns its exit code."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        return _fail(error, EXIT_USAGE)
    except (RunError, ValueError, OSError, MemoryError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was saved.", EXIT_INTERRUPTED)


def parse(argv: Sequence[str]) -> Request:
    """Returns the flags of a command line; `-` and `_` are the same in a flag.

    Raises:
        UsageError: an unknown flag, or a value out of range.
    """
    parser = Parser(
        prog="tune_spec_stream.py",
        description="Choose the number of draft nodes for this device, from measured steps.",
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
        "--batch_size", default="1", help="sequences decoded at once; tuned as the next power of two [1]"
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
    given = vars(parser.parse_args([_normal(word) for word in argv]))
    for name in ("batch_size", "context"):
        given[name] = _whole_number(name, given[name])
    if given["sizes"] is not None:
        parts = given["sizes"].split(",")
        given["sizes"] = tuple(sorted({_whole_number("sizes", part) for part in parts}))
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
    tuning = measure(request, folder)
    sys.stdout.write(table(tuning, request.model_name_or_path))
    if request.save:
        save(folder / CONFIG_FILE, tuning)
        sys.stdout.write(f"saved to {folder / CONFIG_FILE}\n")
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


def measure(request: Request, folder: Path) -> Tuning:
    """Loads the model and returns what tuning found.

    Raises:
        UsageError: there is no such device.
        ValueError: the checkpoint cannot be loaded.
    """
    from benchmark import machine
    from huggingface.transformers.generation.tree_tuning import tune
    from models.loading import load

    here = machine.describe(request.device)
    recipe = fold("spec_stream", {"dtype": request.dtype}, here)
    model = load(recipe, folder, here["device"]).model
    return tune(model, request.sizes, request.context, request.batch_size)


def table(tuning: Tuning, name: str) -> str:
    """Returns what was measured, one line a size, the chosen one marked."""
    speeds = tuning.speeds()
    lines = [
        f"{name} on {tuning.setting}; steps after {tuning.context} tokens, batch {tuning.batch}",
        f"{'nodes':>6}  {'step ms':>9}  {'tokens/step':>11}  {'tokens/s':>9}",
    ]
    for nodes, seconds in tuning.step_s.items():
        mark = "  <- chosen" if nodes == tuning.nodes else ""
        lines.append(
            f"{nodes:>6}  {1000 * seconds:>9.2f}  {tuning.tokens_per_step[nodes]:>11.2f}  {speeds[nodes]:>9.1f}{mark}"
        )
    return "\n".join([*lines, "tokens/step and tokens/s: expected, from the calibrated accuracies."]) + "\n"


def save(file: Path, tuning: Tuning) -> None:
    """Adds the choice to a checkpoint's generation configuration, which is replaced as a whole or not at all."""
    from huggingface.transformers.generation.tree_tuning import CONFIG_KEY

    values: dict[str, Any] = read_json(file) or {}
    settings = values.get(CONFIG_KEY) or {}
    nodes = {**(settings.get("draft_nodes") or {}), tuning.setting: tuning.nodes}
    values[CONFIG_KEY] = {**settings, "draft_nodes": nodes}
    # With this mark upstream drops every key that it does not know.
    values.pop("_from_model_config", None)
    write_json(file, values)


def _fail(message: object, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
