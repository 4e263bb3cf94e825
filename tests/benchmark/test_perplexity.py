"""Perplexity in a run: its columns, its file, resuming it, what it costs when it fails. Workers run a loader without torch."""

import json

import pytest

from benchmark.perplexity import Task, Told, from_json, is_missing, with_perplexity
from benchmark.plan import Cell
from benchmark.summary import Quality
from datasets_code import WikiText2, get_dataset
from tests.benchmark.bench import Bench, snapshot
from tests.benchmark.builders import write_checkpoint

BOTH = ("--datasets", "e2e_nlg,dialogsum", "--perplexity", "wikitext2,references")
TEXT_LENGTH = float(len(WikiText2().load(source="samples").text))


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    return Bench(tmp_path, monkeypatch, capsys)


def told(bench):
    return [json.loads(line) for line in bench.file("perplexity.jsonl").read_text().splitlines()]


def asked(bench, name):
    path = bench.folder / f"faults.engine_{name}.perplexity"
    return len(path.read_bytes()) if path.exists() else 0


def keys(lines):
    return [(line["model_type"], line["text"], line["dataset"]) for line in lines]


def test_every_row_has_both_columns(bench):
    assert bench.run(*BOTH) == 0
    for (_, dataset, _), row in bench.rows().items():
        examples = get_dataset(dataset).load("test", limit=3, source="samples").examples
        references = sum(len(item.references) for item in examples)
        assert row["quality"]["perplexity_wikitext2"] == TEXT_LENGTH
        assert row["quality"]["perplexity_references"] == references
        assert "rouge1" in row["quality"]
        assert row["quality_unavailable"] == {}
    assert keys(told(bench))[:3] == [
        ("naive", "wikitext2", None),
        ("naive", "references", "e2e_nlg"),
        ("naive", "references", "dialogsum"),
    ]
    assert len(told(bench)) == 6
    assert "perplexity_wikitext2 7220" in bench.out
    assert "perplexity: exp of the mean negative log-likelihood" in bench.out
    config = json.loads(bench.file("config.json").read_text())
    assert config["data_source"]["wikitext2"] == "samples"
    assert config["perplexity"] == ["wikitext2", "references"]
    assert len(config["data_fingerprint"]["wikitext2"]) == 16


def test_it_is_off_unless_asked_for(bench):
    assert bench.run() == 0
    assert not bench.file("perplexity.jsonl").exists()
    assert "perplexity" not in bench.out


def test_windows_and_limit_reach_the_worker(bench):
    words = ("--perplexity_window", "64", "--perplexity_stride", "16", "--perplexity_tokens", "0")
    assert bench.run("--perplexity", "wikitext2", *words) == 0
    assert {(line["window"], line["stride"], line["tokens"]) for line in told(bench)} == {(64, 16, 0)}
    assert bench.run("--perplexity", "wikitext2", "--run_name", "other") == 0
    line = json.loads(bench.file("perplexity.jsonl", "other").read_text().splitlines()[0])
    assert (line["window"], line["stride"], line["tokens"]) == (None, None, 32768)


def test_a_rerun_of_a_finished_run_changes_nothing(bench):
    assert bench.run(*BOTH) == 0
    before = snapshot(bench.folder / "results")
    assert bench.run(*BOTH) == 0
    assert snapshot(bench.folder / "results") == before


def test_a_resumed_run_asks_only_for_what_is_missing(bench):
    bench.faults()
    assert bench.run(*BOTH) == 0
    assert asked(bench, "streams") == 3
    path = bench.file("perplexity.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    bench.file("summary.json").unlink()
    records = bench.file("records.jsonl").read_bytes()
    assert bench.run(*BOTH) == 0
    assert asked(bench, "streams") == 4
    assert (path.read_bytes(), bench.file("records.jsonl").read_bytes()) == (whole, records)


def test_a_torn_first_line_is_asked_for_again(bench):
    assert bench.run(*BOTH) == 0
    path = bench.file("perplexity.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:10])
    bench.file("summary.json").unlink()
    assert bench.run(*BOTH) == 0
    assert path.read_bytes() == whole
    before = snapshot(bench.folder / "results")
    assert bench.run(*BOTH) == 0
    assert snapshot(bench.folder / "results") == before


@pytest.mark.parametrize(
    ("fault", "words"), [("error", "cannot do that"), ("die", "SIGKILL"), ("oom", "oom: ")]
)
def test_a_fault_costs_one_number_and_a_rerun_makes_it_good(bench, fault, words):
    bench.faults(engine__streams_at_perplexity={fault: [0]})
    assert bench.run(*BOTH) == 3
    row = bench.rows()["spec_stream", "e2e_nlg", 1]
    assert (row["status"], row["speedup"] > 1) == ("ok", True)
    assert words in row["quality_unavailable"]["perplexity_wikitext2"]
    assert "perplexity_references" in row["quality"]
    assert bench.rows()["naive", "e2e_nlg", 1]["quality_unavailable"] == {}
    assert bench.run(*BOTH) == 0
    assert asked(bench, "streams") == 4
    assert bench.rows()["spec_stream", "e2e_nlg", 1]["quality"]["perplexity_wikitext2"] == TEXT_LENGTH
    assert len(set(keys(told(bench)))) == len(told(bench)) == 6


def test_a_technique_without_an_answer_is_not_asked(bench):
    bench.faults(engine__streams_at_generate={"error": list(range(99))})
    assert bench.run(*BOTH) == 3
    assert {line["model_type"] for line in told(bench)} == {"naive"}


def test_each_technique_is_asked_once_over_all_groups(bench):
    bench.environment.setenv("FAKE_FREE_BYTES", str(2200 << 20))
    assert bench.run("--model_type", "naive,static,spec_stream", "--perplexity", "wikitext2") == 0
    assert len(bench.summary()["rows"]) == 4
    assert sorted(line["model_type"] for line in told(bench)) == ["naive", "spec_stream", "static"]
    assert all(row["quality"] == {"perplexity_wikitext2": TEXT_LENGTH} for row in bench.summary()["rows"])


def test_a_set_without_references_has_no_such_column(bench):
    assert bench.run("--datasets", "synthetic,e2e_nlg", "--perplexity", "references") == 0
    assert bench.rows()["naive", "synthetic", 1]["quality"] == {}
    assert "perplexity_references" in bench.rows()["naive", "e2e_nlg", 1]["quality"]


def test_another_text_is_not_resumed(bench):
    folder = bench.folder / "data" / "wikitext-2"
    folder.mkdir(parents=True)
    (folder / "wiki.test.raw").write_text(" one text \n")
    words = ("--perplexity", "wikitext2", "--data_dir", str(folder.parent))
    assert bench.run(*words) == 0
    bench.file("summary.json").unlink()
    (folder / "wiki.test.raw").write_text(" another \n")
    assert bench.run(*words) == 2
    assert "wikitext2" in bench.err


def test_a_damaged_file_is_named(bench):
    assert bench.run(*BOTH) == 0
    bench.file("summary.json").unlink()
    bench.file("perplexity.jsonl").write_text('{"model_type": "naive"}\n')
    assert bench.run(*BOTH) == 1
    assert "line 1 of " in bench.err
    assert "perplexity.jsonl is not what this file holds" in bench.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--perplexity", "wikitext"], "--perplexity got wikitext, expected some of wikitext2, references"),
        (["--perplexity", "wikitext2,wikitext2"], "each value once"),
        (["--perplexity", "references"], "needs a data set with references"),
        (["--perplexity_window", "64"], "add --perplexity wikitext2"),
        (["--perplexity", "wikitext2", "--perplexity_window", "1"], "expected 2 or more"),
        (["--perplexity", "wikitext2", "--perplexity_window", "half"], "expected auto|N"),
        (["--perplexity", "wikitext2", "--perplexity_window", "65"], "expected at most 64"),
        (["--perplexity", "wikitext2", "--perplexity_stride", "0"], "expected 1 or more"),
        (["--perplexity", "wikitext2", "--perplexity_stride", "65"], "expected at most 64, the window"),
        (["--perplexity", "wikitext2", "--perplexity_tokens", "-1"], "expected 0 or more"),
        (["--perplexity", "wikitext2", "--data_dir", "."], "has no folder 'wikitext-2'"),
    ],
)
def test_wrong_arguments_end_with_2_before_any_worker_starts(bench, words, expected):
    write_checkpoint(bench.checkpoint, streams=4, max_position_embeddings=64)
    assert bench.run(*words) == 2
    assert expected in bench.err
    assert len(bench.err.splitlines()) == 1
    assert not bench.file("worker_naive.log").exists()


def test_columns_belong_to_technique_and_set():
    cells = [Cell("a", "e2e_nlg", 1, 0), Cell("a", "spider", 4, 1), Cell("b", "e2e_nlg", 1, 0)]
    every = [
        Told(Task("a", "wikitext2"), perplexity=2.0),
        Told(Task("a", "references", "spider"), perplexity=3.0),
        Told(Task("b", "wikitext2"), status="oom", reason="out of memory"),
    ]
    found = with_perplexity({cell: Quality({"bleu": 1.0}) for cell in cells}, every)
    assert [found[cell].values for cell in cells] == [
        {"bleu": 1.0, "perplexity_wikitext2": 2.0},
        {"bleu": 1.0, "perplexity_wikitext2": 2.0, "perplexity_references": 3.0},
        {"bleu": 1.0},
    ]
    assert found[cells[2]].unavailable == {"perplexity_wikitext2": "oom: out of memory"}
    assert [is_missing({"quality_unavailable": found[cell].unavailable}) for cell in cells] == [
        False,
        False,
        True,
    ]
    assert not is_missing({"quality_unavailable": {"rouge1": "not installed"}})
    assert [from_json(item.as_json()) for item in every] == every
