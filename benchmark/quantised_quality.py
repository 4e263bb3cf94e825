"""Perplexity of a trained checkpoint in every weight format, as trained and with outliers.

    python -m benchmark.quantised_quality --data_dir data --output_dir results/quality

Formats: INT8, INT4 with one scale an output, in groups of 128 and of 32, after activation-aware scaling, and a precision plan of
1.25 times INT4's bytes. Writes `quality.json` and `quality.md`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.checkpoint import Checkpoint
from benchmark.config import DTYPES, SHIPPED_CHECKPOINT
from benchmark.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RunError, UsageError
from benchmark.files import write_atomically, write_json
from benchmark.flags import Parser
from benchmark.run_directory import output_folder
from datasets_code import MissingDataError

ROOT = Path(__file__).resolve().parents[1]
EXIT_CODES = (
    "exit codes: 0 done; 1 the checkpoint or the text cannot be used; 2 bad arguments; 130 interrupted"
)
RECORDED = ("created_utc", "device_name", "driver", "python", "packages", "commit", "uncommitted_changes")
"""What of the environment a result keeps."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs one call and returns its exit code."""
    try:
        flags = parse(sys.argv[1:] if words is None else words)
        with output_folder(flags.output_dir):
            result = measure(flags)
            write_json(flags.output_dir / "quality.json", result)
            write_atomically(flags.output_dir / "quality.md", report(result))
    except (UsageError, MissingDataError) as error:
        return _fail(error, EXIT_USAGE)
    except (RunError, ValueError, OSError, MemoryError) as error:
        return _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written.", EXIT_INTERRUPTED)
    sys.stdout.write(report(result))
    return EXIT_DONE


def _fail(message: object, code: int) -> int:
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
    return code


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the flags of a command line. Raises UsageError for one that is unknown or out of range."""
    parser = Parser(
        prog="python -m benchmark.quantised_quality",
        description=str(__doc__).split("\n")[0],
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    add: Any = parser.add_argument
    add("--model_name_or_path", default=SHIPPED_CHECKPOINT, help="directory or hub id [%(default)s]")
    add("--model_label", help="the model in words, for the result [the directory's name]")
    add("--data_dir", type=Path, help="folder with the official release files [none]")
    add(
        "--text",
        default="references",
        help="references (validation rows judge, training rows choose), wikitext2, or a text file [%(default)s]",
    )
    add("--tokens", type=_count, default=16384, help="about how many tokens judge [%(default)s]")
    add(
        "--plan_tokens",
        type=_count,
        default=4096,
        help="about how many others choose scales and plans [%(default)s]",
    )
    add("--dtype", default="auto", choices=DTYPES, help="auto: float32 on CPU, bfloat16 on CUDA")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--output_dir", type=Path, required=True, help="folder for quality.json and quality.md")
    return argparse.Namespace(**parser.values(words))


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got '{text}', expected a whole number of 1 or more.")
    return number


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns everything that is measured, with model, text, hardware, versions and date."""
    from benchmark import machine
    from benchmark.environment import collect
    from models.machine import Machine
    from models.technique import Recipe
    from precision import quality
    from precision.study import open_checkpoint

    checkpoint = open_checkpoint(flags.model_name_or_path, ROOT)
    texts = quality.read_texts(flags.text, flags.data_dir)
    place = machine.describe(flags.device)
    kind = place["device"].partition(":")[0]
    recipe = Recipe(decoder="engine").resolved(Machine(kind), flags.dtype)
    subject = quality.read_subject(
        recipe, checkpoint.path, place["device"], texts, flags.tokens, flags.plan_tokens
    )
    environment = collect(place, ROOT)
    width = int(subject.model.config.hidden_size)
    return {
        **_model(flags, checkpoint),
        "dtype": subject.dtype,
        "device": kind,
        **{name: environment[name] for name in RECORDED},
        "text": Path(flags.text).name,
        "text_source": _without_folder(texts.judge.source),
        "judged_samples": len(subject.judge),
        "judged_tokens": sum(len(one.token_ids) for one in subject.judge),
        "choosing_tokens": sum(len(one.token_ids) for one in subject.study),
        "linear_layers": len(subject.modules),
        "linear_weights": sum(module.weight.numel() for module in subject.modules.values()),
        "budget": quality.BUDGET,
        "outliers": {
            layout: {
                "channels": quality.outlier_channels(width, layout),
                "of": width,
                "factor": quality.FACTOR,
            }
            for layout in quality.SHARES
        },
        **quality.measure_quality(subject),
    }


def _model(flags: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "model": flags.model_label or checkpoint.path.resolve().name,
        "fingerprint": checkpoint.fingerprint,
        "parameters": checkpoint.parameters,
    }


def _without_folder(source: str) -> str:
    """Returns where a text comes from, without a folder of this machine."""
    return re.sub(r"data_dir:[^,)]*", "official release files", source)


def report(result: Mapping[str, Any]) -> str:
    """Returns a result as Markdown: a table a model, and what its plan does."""
    parts = [f"# Perplexity of {result['model']} in every weight format", _setting(result)]
    for model in result["plans"]:
        rows = [row for row in result["rows"] if row["model"] == model]
        parts += [
            f"## {TITLES.get(model, model)}",
            _about(result, model),
            _table(rows),
            _plan(result, rows[-1]),
        ]
    return "\n\n".join([*(part for part in parts if part), NOTES]) + "\n"


TITLES = {
    "as trained": "As trained",
    "isolated": "Isolated outliers",
    "runs": "Outliers in runs as wide as a group",
}
NOTES = """## How to read this

- change: of the perplexity, against the model as trained with plain weights, on the same tokens; against g128: the same against
  the row `int4 g128` of its table. s.e.: standard error of the change before it, paired by sample. What is within two of it is
  not told from nothing.
- MB: the linear layers' stored weights, scales included. Plain weights count two bytes each.
- `int4 naive`: one scale an output. `awq g128`: activation-aware scales, then groups of 128. `plan`: INT4 in groups of 128, some
  layers in INT8 or plain.
- AWQ's scales and the plan are chosen on tokens that do not judge."""


def _setting(result: Mapping[str, Any]) -> str:
    packages = result["packages"]
    return (
        f"{result['device_name']}, {result['dtype']}, {result['created_utc'][:10]}; torch {packages.get('torch')}, "
        f"transformers {packages.get('transformers')}. {result['parameters']:,} parameters, of them "
        f"{result['linear_weights']:,} in {result['linear_layers']} linear layers that are packed. Text: {result['text']}, "
        f"{result['text_source']}; {result['judged_tokens']:,} tokens of {result['judged_samples']} samples judge, "
        f"{result['choosing_tokens']:,} others choose."
    )


def _about(result: Mapping[str, Any], model: str) -> str:
    told = result["outliers"].get(model)
    if told is None:
        return ""
    return (
        f"{told['channels']} of {told['of']} channels behind each norm are {told['factor']:g} times larger, the columns that "
        "read them as much smaller. With plain weights the output is the same."
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    from precision.report import percent, table

    default = next(row["bytes"] for row in rows if row["weights"] == "int4 g128")
    heads = ("weights", "MB", "times g128", "perplexity", "change", "± s.e.", "against g128", "± s.e.")
    return table(
        heads,
        (
            (
                row["weights"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['bytes'] / default:.2f}",
                f"{row['perplexity']:.3f}",
                percent(row["nll_change"]),
                _error(row["nll_change_error"]),
                percent(row["nll_against_g128"]),
                _error(row["nll_against_g128_error"]),
            )
            for row in rows
        ),
    )


def _error(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _plan(result: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    share = result["recovered"][row["model"]]
    recovered = (
        "INT4 in groups loses nothing here"
        if share is None
        else f"recovers {100 * share:.0f} % of the loss in groups"
    )
    return f"Plan: {row['int8_layers']} layers in INT8, {row['plain_layers']} plain; {recovered}."


if __name__ == "__main__":
    sys.exit(main())
