"""What programs that time kernels on a GPU share: the command line, the clock, the memory's rate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmark.files import write_atomically, write_json
from huggingface.transformers.integrations import triton_support

REPLAYS = 30


def run(
    program: str,
    description: str,
    shapes: Mapping[str, Any],
    stem: str,
    measure: Callable[[Sequence[str], torch.device], Iterator[dict[str, Any]]],
    report: Callable[[dict[str, Any]], str],
    words: Sequence[str] | None,
) -> int:
    """Runs one call of a program; exit code 2 for bad arguments or a device without the kernels.

    Args:
        program: its module, for messages.
        description: what it does; the first line is shown.
        shapes: what `--shapes` may name.
        stem: name of the files it writes, `stem.json` and `stem.md`.
        measure: names of shapes and device -> what is measured so far, again and again; each is written, so that a run that is
            cut keeps what it had.
        report: what is measured -> Markdown.
        words: the command line, `None` for the process's own.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description.split("\n")[0])
    parser.add_argument(
        "--output_dir", type=Path, required=True, help=f"folder for {stem}.json and {stem}.md"
    )
    parser.add_argument("--shapes", default=",".join(shapes), help="comma list [%(default)s]")
    flags = parser.parse_args(words)
    names = flags.shapes.split(",")
    unknown = [name for name in names if name not in shapes]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = triton_support.unavailable(device) if device.type == "cuda" else "no CUDA device"
    if unknown or reason:
        parser.error(f"--shapes knows {', '.join(shapes)}; got {unknown}." if unknown else str(reason))
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    text = ""
    with torch.no_grad():
        for result in measure(names, device):
            text = report(result)
            write_json(flags.output_dir / f"{stem}.json", result)
            write_atomically(flags.output_dir / f"{stem}.md", text)
    sys.stdout.write(text)
    return 0


def setting(device: torch.device) -> dict[str, Any]:
    """Returns date, hardware and versions of a measurement."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device_name": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton_support.triton.__version__,
    }


def copy_bandwidth(device: torch.device) -> float:
    """Returns bytes read and written a second by a large copy, the ceiling that weights are read at."""
    source = torch.empty(2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), 5)
    return 2 * source.nbytes / seconds


def timed(work: Callable[[], object], times: int = REPLAYS) -> float:
    """Returns the device's seconds for one run of the work, the mean of several in a row."""
    for _ in range(3):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(times):
        work()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000 / times
