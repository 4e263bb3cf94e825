"""Train streams: for a small model from scratch, jointly with a checkpoint, or as adapters on a frozen one.

`--mode scratch --model_config configs/spec_stream_9m.json --output_dir runs/small` trains the small model; `--mode adapter
--model_name_or_path DIR --train_file own.jsonl --output_dir runs/own` trains streams for one's own model. Under
`accelerate launch` the same flags use several devices.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from safetensors import SafetensorError

from datasets_code import DataError, MissingDataError
from training.arguments import TrainingFlags, parse_flags
from training.checkpoints import check_output_dir
from training.data import check_sources
from training.errors import CheckpointError, DivergedError
from training.models import check_checkpoint, read_model_file


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 done, 1 could not go on, 2 wrong arguments, 130 interrupted."""
    flags = parse_flags(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        check(flags)
        from training.run import run

        print(run(flags))  # noqa: T201 - the folder is the program's result
    except MissingDataError as error:
        return fail(error, 2)
    except (DataError, CheckpointError, DivergedError, SafetensorError, MemoryError, OSError) as error:
        return fail(error, 1)
    except ValueError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted; go on with --resume_from_checkpoint latest.", 130)
    return 0


def check(flags: TrainingFlags) -> None:
    """Raises ValueError for what can be told wrong before torch is imported."""
    files = {"train_file": flags.train_file, "validation_file": flags.validation_file}
    check_sources(flags.datasets, flags.data_dir, files)
    if flags.model_config is not None:
        read_model_file(flags.model_config)
    if flags.model_name_or_path is not None:
        check_checkpoint(flags.model_name_or_path)
    check_output_dir(flags.output_dir, flags.resume_from_checkpoint is not None)


def fail(message: object, code: int) -> int:
    """Prints one line to standard error and returns the exit code."""
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
