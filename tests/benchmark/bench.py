"""Runs `dataset_tps.py` with the fake loader, and looks at what it leaves behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import dataset_tps
from tests.benchmark.builders import write_checkpoint

ROOT = Path(__file__).parents[2]
LOADER = "tests.benchmark.fake_loader"
IDENTITY = ("model_type", "dataset", "batch_size", "prompt_id", "repeat")


class Bench:
    """Runs `dataset_tps.py` in a folder of its own with the fake loader."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder = folder
        self.environment = monkeypatch
        self.capsys = capsys
        self.checkpoint = write_checkpoint(folder / "checkpoint", streams=4)

    def words(self, *words):
        common = ["--model_name_or_path", str(self.checkpoint), "--output_dir", str(self.folder / "results")]
        return [
            *common,
            "--datasets",
            "synthetic",
            "--limit",
            "3",
            "--num_runs",
            "2",
            "--run_name",
            "run",
            *words,
        ]

    def run(self, *words):
        self.capsys.readouterr()
        code = dataset_tps.main(self.words(*words), loader=LOADER)
        self.out, self.err = self.capsys.readouterr()
        return code

    def start(self, *words):
        command = [sys.executable, "-m", "tests.benchmark.fake_run", *self.words(*words)]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts its background jobs with interrupts ignored, and so would be ours.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )

    def faults(self, **by_request):
        path = self.folder / "faults.json"
        path.write_text(
            json.dumps({key.replace("__", ":").replace("_at_", "/"): v for key, v in by_request.items()})
        )
        self.environment.setenv("FAKE_FAULTS", str(path))

    def file(self, name, run="run"):
        return self.folder / "results" / run / name

    def summary(self, run="run"):
        return json.loads(self.file("summary.json", run).read_text())

    def records(self, run="run"):
        return [json.loads(line) for line in self.file("records.jsonl", run).read_text().splitlines()]

    def rows(self):
        return {(row["model_type"], row["dataset"], row["batch_size"]): row for row in self.summary()["rows"]}


def comparable(records):
    """Returns records by identity, without what differs between processes."""
    found = {}
    for record in records:
        key = tuple(record[name] for name in IDENTITY)
        assert key not in found, f"doubled: {key}"
        found[key] = {
            name: value for name, value in record.items() if name not in ("peak_memory_bytes", "wall_s")
        }
    return found


def snapshot(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def children(pid):
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def ended(pid):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
