"""Measures which layers quantisation hurts, and plans which of them keep more bits within a memory budget.

    python sensitivity.py --model_name_or_path checkpoints/spec_stream_9m --data_dir data --budget 1.25
    python dataset_tps.py --model_type naive,int4 --precision_plan results/sensitivity/spec_stream_9m/plan.json

Each unit is quantised alone and put back: what it does to weights, outputs and perplexity is a line on disk at once, so the same
command goes on where it stopped. The folder then holds `report.md`, `sensitivity.csv`, `plan.json` and `figures/`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.config import DTYPES, SHIPPED_CHECKPOINT
from benchmark.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    RunError,
    UsageError,
)
from benchmark.flags import Parser
from datasets_code import MissingDataError
from precision.units import BY, MODULE

ROOT = Path(__file__).resolve().parent
RESULTS = Path("results") / "sensitivity"
GROUP_SIZE = 128
EXIT_CODES = """exit codes: 0 done; 1 the checkpoint or the text cannot be used; 2 bad arguments; 3 done, but without figures
(matplotlib is missing); 130 interrupted, the same command resumes"""


@dataclass(frozen=True)
class Request:
    """The flags of one call; `window` is None for the model's own, `group_size` for one scale an output."""

    model_name_or_path: str
    data_dir: Path | None
    text: str
    bits: int
    group_size: int | None
    by: str
    tokens: int
    window: int | None
    dtype: str
    device: str
    budget: float
    output_dir: Path
    resume: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one call and returns its exit code."""
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except (UsageError, MissingDataError) as error:
        return _fail(error, EXIT_USAGE)
    except (RunError, ValueError, OSError, MemoryError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where this one stopped.", EXIT_INTERRUPTED)


def parse(argv: Sequence[str]) -> Request:
    """Returns the flags of a command line; `-` and `_` are the same in a flag.

    Raises:
        UsageError: an unknown flag, or a value out of range.
    """
    given = _parser().values([_normal(word) for word in argv])
    given["tokens"] = _whole_number("tokens", given["tokens"], 1)
    given["window"] = None if given["window"] == "auto" else _whole_number("window", given["window"], 2)
    given["group_size"] = _group_size(given["bits"], given["group_size"])
    given["budget"] = _budget(given["budget"])
    name = Path(given["model_name_or_path"]).name or "model"
    given["output_dir"] = given["output_dir"] or RESULTS / name
    return Request(**given)


def _parser() -> Parser:
    parser = Parser(
        prog="sensitivity.py",
        description="Which layers quantisation hurts, and precision plans.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add("--model_name_or_path", default=SHIPPED_CHECKPOINT, help="directory or hub id [%(default)s]")
    add("--data_dir", type=Path, help="folder with the official release files, such as wikitext-2/ [none]")
    add(
        "--text",
        default="wikitext2",
        help="wikitext2, references (of the data sets), or a text file [%(default)s]",
    )
    add("--bits", type=int, choices=(4, 8), default=4, help="of the trial format [%(default)s]")
    add(
        "--group_size",
        help="inputs that share a scale: 32, 64, 128, or none for one an output [128 at 4 bits]",
    )
    add(
        "--by",
        choices=BY,
        default=MODULE,
        help="what is quantised alone; module: each linear layer [%(default)s]",
    )
    add("--tokens", default="4096", help="judged tokens a unit, and as many others a plan [%(default)s]")
    add(
        "--window",
        default="auto",
        help="tokens of a sample of running text [auto: the positions, at most 512]",
    )
    add("--dtype", default="auto", choices=DTYPES, help="auto: float32 on CPU, bfloat16 on CUDA")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add(
        "--budget",
        default="1.25",
        help="bytes of plan.json over those with all in the trial format [%(default)s]",
    )
    add("--output_dir", type=Path, help=f"folder of the study [{RESULTS}/<model>]")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with what is measured; --no-resume starts anew [on]",
    )
    return parser


def _normal(word: str) -> str:
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or flag == "--no-resume":
        return word
    return "--" + flag[2:].replace("-", "_").replace("no_resume", "no-resume") + equals + value


def _whole_number(name: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(f"--{name} got '{text}', expected a whole number of {least} or more.")
    return number


def _group_size(bits: int, text: str | None) -> int | None:
    if text is None:
        return GROUP_SIZE if bits == 4 else None
    if text == "none":
        return None
    if bits == 8 or text not in ("32", "64", "128"):
        raise UsageError(
            f"--group_size got '{text}' with --bits {bits}; 4 bits take 32, 64, 128 or none, 8 bits none."
        )
    return int(text)


def _budget(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 1):
        raise UsageError(f"--budget got '{text}', expected a number of 1 or more.")
    return number


def run(request: Request) -> int:
    """Studies, writes and prints as asked; returns the exit code."""
    from benchmark.figures import FiguresUnavailable
    from benchmark.run_directory import output_folder
    from huggingface.transformers.quantizers.packing import WeightFormat
    from precision.figures import draw
    from precision.files import StudyFiles
    from precision.report import write_tables
    from precision.study import Options, study

    options = Options(
        model_name_or_path=request.model_name_or_path,
        text=request.text,
        data_dir=request.data_dir,
        kind=WeightFormat(request.bits, request.group_size),
        by=request.by,
        tokens=request.tokens,
        window=request.window,
        dtype=request.dtype,
        device=request.device,
        budget=request.budget,
    )
    with output_folder(request.output_dir):
        findings = study(options, StudyFiles(request.output_dir, request.resume), ROOT)
    code = EXIT_DONE
    try:
        draw(findings, request.output_dir / "figures")
    except FiguresUnavailable as error:
        sys.stderr.write(f"warning: {error}\n")
        code = EXIT_INCOMPLETE
    write_tables(findings, request.output_dir)
    sys.stdout.write(f"{request.output_dir / 'report.md'}\n{request.output_dir / 'plan.json'}\n")
    return code


def _fail(message: object, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
