"""A study of the streams' shape: small variants trained alike, and what each one's drafts are worth on held-out text.

    python -m training.study --output_dir runs/study --data_dir DATA --minutes 3 --variants gamma,layers,transition,lora

Each variant is a process of its own, several at a time on one device: a small model leaves most of it idle. Acceptance is read
off the model's own continuations of held-out prompts and the ranks its streams gave their tokens, which is what decoding with
a static tree accepts, without decoding once for each tree. A finished variant is not trained again.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from training.arguments import TrainingFlags, flags_from
from training.checkpoints import make_output_dir
from training.data import check_sources
from training.study_plan import Job, Plan, StudyFlags, plan_study, stock_folder, training_values

JOB_FILE, RESULT_FILE, LOG_FILE = "job.json", "result.json", "log.txt"
POLL_S = 0.2
logger = logging.getLogger(__name__)


class Process(Protocol):
    """What the scheduler needs of a running job; :class:`subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Returns the exit code, or None while it runs."""

    def terminate(self) -> None:
        """Asks it to stop."""


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0 all done, 1 not all done, 2 wrong arguments, 130 interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if words[:1] == ["--run_job"]:
        run_job(Path(words[1]))
        return 0
    flags = flags_from(
        StudyFlags, words, "python -m training.study", "Compare shapes of the streams on small models."
    )
    try:
        return study(flags)
    except ValueError as error:
        logger.error("error: %s", error)
        return 2
    except OSError as error:
        logger.error("error: %s", error)
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; the same command goes on with what is missing.")
        return 130


def study(flags: StudyFlags) -> int:
    """Trains what is missing and writes `study.json` and `study.md`; returns 0, or 1 if a job failed.

    Raises:
        ValueError: for a mistake that shows before the first job; nothing is written then.
        OSError: for a folder that cannot be made or written.
    """
    from training.study_report import study_document, study_tables

    plan = plan_study(flags)
    check(flags, plan)
    make_output_dir(flags.output_dir)
    missing = [job for job in plan.jobs if finished_result(flags.output_dir, job) is None]
    logger.info("%d jobs, %d of them to do", len(plan.jobs), len(missing))
    failures = run_jobs(missing, flags.jobs, lambda job: start(flags.output_dir, job, flags.jobs))
    reasons = {name: reason or last_line(flags.output_dir / name) for name, reason in failures.items()}
    document = study_document(flags, plan, finished_results(flags.output_dir, plan), reasons)
    write_whole(flags.output_dir / "study.json", json.dumps(document, indent=1))
    write_whole(flags.output_dir / "study.md", study_tables(document))
    logger.info("%s", study_tables(document))
    return 1 if failures else 0


def check(flags: StudyFlags, plan: Plan) -> None:
    """Raises ValueError for data that are not there, and for what training would refuse in any of the jobs."""
    check_sources(flags.datasets, flags.data_dir, {"train_file": flags.train_file})
    for job in plan.jobs:
        TrainingFlags(**training_values(job.settings))


def run_jobs(jobs: Sequence[Job], at_once: int, launch: Callable[[Job], Process]) -> dict[str, str]:
    """Runs the jobs, so many at a time and each after the one it needs.

    Returns:
        The failed jobs' names, each with the reason where the scheduler knows it.
    """
    waiting, running = list(jobs), dict[str, Process]()
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            for name in failed_of_ended(running):
                failures[name] = ""
            for job in [job for job in waiting if job.needs in failures]:
                failures[job.name] = f"needs {job.needs}, which failed"
                waiting.remove(job)
            unfinished = {*running, *failures, *(job.name for job in waiting)}
            ready = [job for job in waiting if job.needs not in unfinished]
            for job in ready[: max(at_once - len(running), 0)]:
                waiting.remove(job)
                running[job.name] = launch(job)
                logger.info("%s: started, %d waiting", job.name, len(waiting))
            if running:
                time.sleep(POLL_S)
    finally:
        for process in running.values():
            process.terminate()
    return failures


def failed_of_ended(running: dict[str, Process]) -> list[str]:
    """Returns the names of the jobs that failed, after taking all ended ones out of `running` in place."""
    ended = {name: code for name, process in running.items() if (code := process.poll()) is not None}
    for name, code in ended.items():
        del running[name]
        logger.info("%s: %s", name, "failed" if code else "done")
    return [name for name, code in ended.items() if code]


def start(output_dir: Path, job: Job, at_once: int) -> subprocess.Popen[bytes]:
    """Returns the started process of a job; what it says goes to a file in its folder."""
    folder = output_dir / job.name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JOB_FILE, json.dumps(asdict(job), indent=1))
    threads = str(max((os.cpu_count() or 1) // at_once, 1))  # each would otherwise take all
    places = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
    }
    words = [sys.executable, "-m", "training.study", "--run_job", str(folder / JOB_FILE)]
    with (folder / LOG_FILE).open("wb") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


def run_job(path: Path) -> None:
    """Does one job and writes its result beside its file."""
    begin = time.monotonic()
    values = json.loads(path.read_text(encoding="utf-8"))
    job = Job(**values)
    flags = TrainingFlags(**training_values(job.settings))
    found = {"variant": train_variant, "base": train_base, "targets": write_targets}[job.kind](flags)
    result = {
        "name": job.name,
        **found,
        "seconds_in_all": round(time.monotonic() - begin, 1),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(flags),
        "settings": job.settings,
    }
    write_whole(path.with_name(RESULT_FILE), json.dumps(result, indent=1))


def train_variant(flags: TrainingFlags) -> dict[str, Any]:
    """Trains and measures; returns steps, minutes, and by set the ranks and acceptance lengths."""
    from training.run import train

    outcome = train(flags)
    if outcome.calibration is None:
        raise ValueError("nothing is held out, so nothing can be measured; give more data.")
    sets = {name: asdict(part) for name, part in outcome.calibration.sets.items()}
    for part in sets.values():
        part["acceptance_length"] = {str(nodes): value for nodes, value in part["acceptance_length"].items()}
    return {
        "steps": outcome.steps,
        "minutes": round(outcome.minutes, 3),
        "rank_accuracy": outcome.calibration.rank_accuracy,
        "sets": sets,
    }


def train_base(flags: TrainingFlags) -> dict[str, Any]:
    """Trains a plain model and saves it as stock `transformers` would; returns steps and minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from huggingface.transformers.models.spec_stream import stock_class, stock_config
    from training.run import train

    outcome = train(flags)
    model = AutoModelForCausalLM.from_pretrained(flags.output_dir)
    plain = stock_class(model.config)(stock_config(model.config))
    main = {name: value for name, value in model.state_dict().items() if not name.startswith("streams.")}
    plain.load_state_dict(main)
    folder = stock_folder(flags.output_dir.parent)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(flags.output_dir).save_pretrained(folder)
    return {"steps": outcome.steps, "minutes": round(outcome.minutes, 3)}


def write_targets(flags: TrainingFlags) -> dict[str, Any]:
    """Lets the base continue all training prompts, once for all adapters; returns how many."""
    from training.run import load, prepare, prepare_targets
    from training.trainer import training_arguments

    process = training_arguments(flags)
    prepared = prepare(flags, load(flags), True, process.device)
    prepare_targets(flags, prepared, process)
    return {"prompts": len(prepared.train)}


def hardware(flags: TrainingFlags) -> dict[str, str]:
    """Returns what a job ran on and in."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    dtype = (
        "bfloat16 autocast"
        if flags.bf16
        else "bfloat16 weights, float32 copies"
        if flags.bf16_weights
        else "float32"
    )
    return {
        "device": device,
        "dtype": dtype,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finished_result(output_dir: Path, job: Job) -> dict[str, Any] | None:
    """Returns what a job wrote when it was done with the same settings, or None."""
    try:
        result = json.loads((output_dir / job.name / RESULT_FILE).read_text(encoding="utf-8"))
        same = result["settings"] == json.loads(json.dumps(job.settings))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return result if same else None


def finished_results(output_dir: Path, plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns the results of all jobs that are done, by name."""
    found = {job.name: finished_result(output_dir, job) for job in plan.jobs}
    return {name: result for name, result in found.items() if result is not None}


def last_line(folder: Path) -> str:
    """Returns the last line that a job said."""
    text = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace")
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "said nothing")


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
