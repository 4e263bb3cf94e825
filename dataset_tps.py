"""Measures decoding techniques on the same prompts: flags -> plan -> run -> summary -> table.

    python dataset_tps.py --model_type spec_stream

This process imports no torch and touches no device; each technique lives in a worker process of its own.
"""

import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from benchmark import flags
from benchmark.config import RunConfig
from benchmark.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, RunError, UsageError
from benchmark.redaction import redact
from benchmark.run import carry_out
from benchmark.run_directory import RunDirectory, describe_os_error
from benchmark.table import print_table

LOADER = "models.loading"


def main(argv: Sequence[str] | None = None, loader: str = LOADER) -> int:
    """Returns the exit code of a run.

    Args:
        argv: the command line; the process's own by default.
        loader: module that workers load techniques with.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, force=True)
    logging.getLogger("benchmark").setLevel(logging.INFO)  # ours alone: libraries stay quiet
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    config: RunConfig | None = None
    try:
        config = flags.parse(sys.argv[1:] if argv is None else argv)
        return show(carry_out(config, loader))
    except UsageError as error:
        return _end(EXIT_USAGE, str(error))
    except RunError as error:
        return _end(EXIT_FAILED, str(error))
    except OSError as error:
        return _end(EXIT_FAILED, describe_os_error(error))
    except KeyboardInterrupt:
        words = flags.command_line(config) if config else []
        return _end(
            EXIT_INTERRUPTED, f"interrupted; to go on: {shlex.join(['python', 'dataset_tps.py', *words])}"
        )


def show(directory: RunDirectory) -> int:
    """Prints a finished run's table and, last, one line of JSON with its directory; returns its exit code."""
    summary = directory.read("summary.json", rows=list, exit_code=int)
    config = directory.read("config.json")
    machine = directory.read("environment.json", device_name=str)["device_name"]
    weights = ", RANDOM WEIGHTS" if config["random_weights"] else ""
    sources = ", ".join(f"{name}: {source}" for name, source in config["data_source"].items())
    print_table(summary["rows"], f"{config['model_name_or_path']}{weights} on {machine}; {sources}")
    last = {"run_dir": str(directory.path), "exit_code": summary["exit_code"]}
    sys.stdout.write(json.dumps(last) + "\n")
    sys.stdout.flush()
    return int(summary["exit_code"])


def _end(code: int, message: str) -> int:
    sys.stderr.write(f"{'' if code == EXIT_INTERRUPTED else 'error: '}{redact(' '.join(message.split()))}\n")
    return code


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
