"""Crashes, hangs, kills, full disks: each costs what it must and no record is lost or doubled."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from tests.benchmark.bench import ROOT, Bench, children, comparable, ended, lines_of


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    return Bench(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("oom", "oom", "out of memory"),
        ("full", "oom", "needs 9 bytes (0.0 GiB), and 3"),
        ("device", "error", "device-side assert"),
        ("die", "error", "killed by SIGKILL"),
        ("error", "error", "cannot do that"),
    ],
)
def test_a_fault_costs_one_cell_and_a_rerun_makes_it_good(bench, fault, status, words):
    # Request 0 is the warm-up of batch size 1, so request 2 is the second prompt there.
    bench.faults(engine__streams_at_generate={fault: [2]})
    assert bench.run("--batch_size", "1,2") == 3
    broken = bench.rows()["spec_stream", "synthetic", 1]
    assert (broken["status"], broken["tokens_per_s"]) == (status, None)
    assert words in broken["reason"]
    assert bench.rows()["spec_stream", "synthetic", 2]["status"] == "ok"
    assert bench.rows()["naive", "synthetic", 1]["status"] == "ok"
    assert bench.run("--batch_size", "1,2") == 0
    assert bench.rows()["spec_stream", "synthetic", 1]["status"] == "ok"
    assert len(comparable(bench.records())) == 2 * 2 * 3 * 2


def test_a_fault_of_the_breakdown_is_told_and_a_rerun_makes_it_good(bench):
    # A warm-up and two repeats of three prompts come before.
    bench.faults(engine__streams_at_generate={"error": [8]})
    assert bench.run() == 3
    row = bench.rows()["spec_stream", "synthetic", 1]
    assert (row["status"], row["breakdown_s"]) == ("ok", None)
    assert "error: " in row["breakdown_reason"] and "cannot do that" in row["breakdown_reason"]
    records = bench.file("records.jsonl").read_bytes()
    assert bench.run() == 0
    row = bench.rows()["spec_stream", "synthetic", 1]
    assert (set(row["breakdown_s"]), row["breakdown_reason"]) == ({"prefill", "forward"}, None)
    assert bench.file("records.jsonl").read_bytes() == records


def test_a_fault_of_the_sweep_is_told_and_a_rerun_makes_it_good(bench):
    words = ("--acceptance_sweep", "0,1", "--no-breakdown")
    bench.faults(engine__streams_at_generate={"error": [8]})
    assert bench.run(*words) == 3
    assert [point["status"] for point in bench.summary()["acceptance_sweep"]] == ["error", "ok"]
    assert bench.run(*words) == 0
    assert [point["status"] for point in bench.summary()["acceptance_sweep"]] == ["ok", "ok"]


def test_a_hang_costs_one_cell(bench):
    bench.environment.setattr("benchmark.worker_client.DUMP_S", 0.2)
    bench.faults(engine__streams_at_generate={"hang": [1]})
    assert bench.run("--timeout_s", "0.5") == 3
    assert bench.rows()["spec_stream", "synthetic", 1]["status"] == "timeout"


def test_a_technique_that_does_not_load(bench):
    bench.faults(engine__none_at_load={"error": list(range(9))})
    assert bench.run("--model_type", "naive,static,spec_stream") == 3
    assert bench.rows()["static", "synthetic", 1]["status"] == "error"
    assert bench.rows()["spec_stream", "synthetic", 1]["status"] == "ok"
    assert bench.run("--model_type", "static", "--run_name", "alone") == 1
    assert "static cannot be loaded" in bench.err.splitlines()[-1]
    assert bench.err.count("this technique cannot do that") == 1


@pytest.mark.parametrize("tail", ['{"model_type": "na', "not json\n"])
def test_a_torn_last_line_is_dropped_and_asked_for_again(bench, tail):
    assert bench.run() == 0
    whole = comparable(bench.records())
    lines = bench.file("records.jsonl").read_text().splitlines(keepends=True)
    bench.file("records.jsonl").write_text("".join(lines[:-2]) + tail)
    bench.file("summary.json").unlink()
    assert bench.run() == 0
    assert comparable(bench.records()) == whole


def test_a_broken_line_costs_no_answer_after_it(bench):
    assert bench.run() == 0
    whole = comparable(bench.records())
    path = bench.file("records.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    broken = "".join([*lines[:2], "{broken\n", *lines[3:]])
    path.write_text(broken)
    bench.file("summary.json").unlink()
    assert bench.run() == 1
    (line,) = [line for line in bench.err.splitlines() if line.startswith("error")]
    assert f"line 3 of {path} cannot be parsed; delete that line, or add --overwrite" in line
    assert path.read_text() == broken
    path.write_text("".join([*lines[:2], *lines[3:]]))
    assert bench.run() == 0
    assert comparable(bench.records()) == whole


def test_killed_parents_lose_and_double_nothing(bench):
    """SIGKILL at random points, then the same command until it is done: the records are those of one clean run."""
    words = ("--limit", "6", "--model_type", "naive,static,spec_stream", "--batch_size", "1,2")
    assert bench.run(*words, "--run_name", "clean") == 0
    bench.environment.setenv("FAKE_DELAY", "0.01")
    chance = random.Random(0)
    reached = 0
    for _ in range(6):
        process = bench.start(*words)
        target = reached + chance.randint(0, 6)
        while reached < target or not children(process.pid):
            time.sleep(0.003)
            reached = lines_of(bench.file("records.jsonl"))
        workers = children(process.pid)
        process.kill()
        process.wait()
        process.stdout.close(), process.stderr.close()
        assert all(ended(pid) for pid in workers)
    assert 0 < reached < 2 * 3 * 2 * 6
    bench.environment.setenv("FAKE_DELAY", "0")
    assert bench.run(*words) == 0
    assert comparable(bench.records()) == comparable(bench.records("clean"))
    assert bench.summary()["rows"] == without_memory(bench.summary("clean")["rows"], bench.summary()["rows"])


def without_memory(rows, like):
    return [
        row | {"peak_memory_bytes": other["peak_memory_bytes"]} for row, other in zip(rows, like, strict=True)
    ]


def test_killed_workers_lose_and_double_nothing(bench):
    """Workers die at more than fifty random requests; reruns go on until all is done."""
    words = ("--limit", "6", "--batch_size", "1,2,3", "--no-breakdown")
    assert bench.run(*words, "--run_name", "clean") == 0
    chance = random.Random(1)
    bench.faults(
        stock__none_at_generate={"die": chance.sample(range(400), 200)},
        engine__streams_at_generate={"die": chance.sample(range(400), 200)},
    )
    codes, deaths = [3], 0
    while codes[-1] == 3 and len(codes) < 60:
        codes.append(bench.run(*words))
        deaths += bench.err.count("was killed by SIGKILL")
    assert codes[-1] == 0
    assert deaths >= 50
    assert comparable(bench.records()) == comparable(bench.records("clean"))


def test_an_interrupt_flushes_and_names_the_command_that_goes_on(bench):
    bench.environment.setenv("FAKE_DELAY", "0.05")
    process = bench.start("--limit", "30")
    while not bench.file("records.jsonl").exists():
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "python dataset_tps.py" in err
    assert "--limit 30" in err
    assert "Traceback" not in err
    assert all(ended(pid) for pid in workers)
    assert not bench.file("LOCK").exists()
    bench.environment.setenv("FAKE_DELAY", "0")
    assert bench.run("--limit", "30") == 0


def test_a_second_run_in_the_same_directory_is_refused(bench):
    bench.environment.setenv("FAKE_DELAY", "0.05")
    process = bench.start("--limit", "50")
    while not bench.file("records.jsonl").exists():
        time.sleep(0.02)
    assert bench.run("--limit", "50") == 2
    assert f"process {process.pid} on {os.uname().nodename}" in bench.err
    assert bench.run("--limit", "50", "--overwrite") == 2
    process.kill()
    process.communicate()


def test_a_full_disk_ends_with_1_and_the_rest_can_follow(bench):
    words = ("--limit", "8")
    limit = 16_000

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    command = [sys.executable, "-m", "tests.benchmark.fake_run", *bench.words(*words)]
    done = subprocess.run(
        command, cwd=ROOT, preexec_fn=small_files, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "disk is full or a size limit is reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert bench.run(*words) == 0
    assert len(comparable(bench.records())) == 2 * 8 * 2


def test_an_output_folder_that_cannot_be(bench):
    (bench.folder / "results").write_text("a file")
    assert bench.run() == 2
    assert "a file is in the way" in bench.err


def test_an_unwritable_output_folder_ends_before_a_worker_starts(bench):
    bench.environment.setattr("benchmark.run_directory.write_atomically", refuse)
    assert bench.run() == 1
    assert "choose another --output_dir" in bench.err
    assert not bench.file("worker_naive.log").exists()


def refuse(path, text):
    raise PermissionError(13, "Permission denied", str(path))
