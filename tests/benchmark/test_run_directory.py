"""What a run finds in its directory: another run's files, damaged ones, and what `--overwrite` does to them."""

import json

import pytest

from tests.benchmark.bench import Bench, comparable, snapshot


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    return Bench(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    "damage",
    ["{", "[]", "{}", '{"rows": 3}', '{"rows": [], "exit_code": 0}', '{"rows": [{}], "exit_code": 0}', "null",
     '{"rows": [{"model_type": "a", "dataset": "b", "batch_size": 1}], "exit_code": 0}'],
)  # fmt: skip
def test_a_damaged_summary_is_made_anew(bench, damage):
    assert bench.run() == 0
    rows, records = bench.rows(), bench.file("records.jsonl").read_bytes()
    bench.file("summary.json").write_text(damage)
    assert bench.run() == 0
    assert bench.rows() == rows
    assert bench.file("records.jsonl").read_bytes() == records


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", "{"),
        ("environment.json", "[]"),
        ("environment.json", "{}"),
        ("environment.json", None),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"schema_version": 1}'),
    ],
)
def test_a_damaged_file_of_a_run_is_one_line(bench, finished, name, content):
    assert bench.run() == 0
    if not finished:
        bench.file("summary.json").unlink()
    file = bench.file(name)
    file.unlink() if content is None else file.write_text(content)
    records = bench.file("records.jsonl").read_bytes()
    assert bench.run() == 1
    lines = [line for line in bench.err.splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1
    assert f"error: {file} " in lines[0] and "--overwrite" in lines[0]
    assert bench.file("records.jsonl").read_bytes() == records
    assert bench.run("--overwrite") == 0


@pytest.mark.parametrize("content", ["{", "[]", '{"naive": 3}', "null"])
def test_damaged_facts_of_techniques_are_one_line(bench, content):
    assert bench.run() == 0
    bench.file("summary.json").unlink()
    bench.file("techniques.json").write_text(content)
    assert bench.run() == 1
    lines = [line for line in bench.err.splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1
    assert f"error: {bench.file('techniques.json')} " in lines[0] and "--overwrite" in lines[0]


def test_overwrite_deletes_only_what_a_run_writes(bench):
    assert bench.run() == 0
    bench.file("notes.txt").write_text("mine")
    assert bench.run("--overwrite") == 0
    assert bench.file("notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ("--device", "cuda"),
        ("--model_type", "flash"),
        ("--datasets", "jsonl"),
        ("--acceptance_sweep", "1", "--model_type", "naive"),
    ],
)
def test_overwrite_deletes_nothing_where_the_new_run_cannot_begin(bench, words):
    assert bench.run() == 0
    before = snapshot(bench.folder / "results")
    assert bench.run("--overwrite", *words) == 2
    after = snapshot(bench.folder / "results")
    results = [path for path in before if path.suffix != ".log"]
    assert [after.get(path) for path in results] == [before[path] for path in results]


def test_overwrite_starts_anew_from_a_damaged_run(bench):
    assert bench.run() == 0
    bench.file("config.json").write_text("{")
    bench.file("worker_naive.log").write_text("of the earlier run")
    assert bench.run("--overwrite") == 0
    assert len(comparable(bench.records())) == 2 * 3 * 2
    assert "of the earlier run" not in bench.file("worker_naive.log").read_text()


def test_a_checkpoint_that_was_tuned_since_is_another_run(bench):
    assert bench.run() == 0
    (bench.checkpoint / "generation_config.json").write_text('{"draft_nodes": {"cpu": 4}}')
    assert bench.run() == 2
    assert "generation_config.json there; give another --run_name" in bench.err


def test_a_run_of_another_version_is_not_resumed(bench):
    assert bench.run() == 0
    config = json.loads(bench.file("config.json").read_text())
    bench.file("config.json").write_text(json.dumps(config | {"schema_version": 0}))
    assert bench.run() == 2
    assert "another version" in bench.err


def test_other_options_under_the_same_name_are_refused(bench):
    assert bench.run() == 0
    assert bench.run("--max_new_tokens", "9", "--seed", "3") == 2
    assert "--max_new_tokens 256 -> 9" in bench.err
    assert "--seed 0 -> 3" in bench.err
    assert bench.run("--no-resume") == 2
    assert bench.run("--max_new_tokens", "3", "--overwrite") == 0
    assert {len(record["token_ids"]) for record in bench.records()} == {3}
    (bench.checkpoint / "config.json").write_text('{"model_type": "gpt_neo", "vocab_size": 5}')
    assert bench.run("--max_new_tokens", "3") == 2
    assert "other weights" in bench.err
