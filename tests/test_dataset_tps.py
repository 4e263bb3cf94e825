"""The command line as users and scripts see it: exit codes, files, messages. Workers run a loader without torch."""

import csv
import json
import subprocess
import sys
import time

import pytest

import dataset_tps
from tests.benchmark.bench import LOADER, ROOT, Bench, comparable, snapshot
from tests.benchmark.builders import write_checkpoint


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    return Bench(tmp_path, monkeypatch, capsys)


def test_a_run_leaves_everything_the_contract_names(bench):
    assert bench.run("--acceptance_sweep", "0,1") == 0
    rows = bench.rows()
    assert list(rows) == [("naive", "synthetic", 1), ("spec_stream", "synthetic", 1)]
    spec = rows["spec_stream", "synthetic", 1]
    assert spec["speedup"] > 1
    assert (spec["match_rate"], spec["status"], spec["weight_bytes"], spec["kv_bytes"]) == (
        1.0,
        "ok",
        1000,
        10,
    )
    assert set(spec["breakdown_s"]) == {"prefill", "forward"}
    records = bench.records()
    assert len(comparable(records)) == 2 * 3 * 2
    assert [record["model_type"] for record in records[:4]] == [
        "naive",
        "spec_stream",
        "naive",
        "spec_stream",
    ]
    points = bench.summary()["acceptance_sweep"]
    assert [(point["model_type"], point["acceptance_ratio"]) for point in points] == [
        ("spec_stream", 0),
        ("spec_stream", 1),
    ]
    assert [point["tokens_per_s"] for point in points] == [pytest.approx(spec["tokens_per_s"])] * 2
    config = json.loads(bench.file("config.json").read_text())
    assert (config["max_new_tokens"], config["device"], config["dtype"]) == (256, "cpu", "float32")
    assert config["model_config"]["architectures"] == ["GPTNeoForCausalLM"]
    assert config["data_source"] == {"synthetic": "generated"}
    assert json.loads(bench.file("environment.json").read_text())["device_name"] == "fake"
    assert len(list(csv.DictReader(bench.file("summary.csv").open()))) == 2
    assert not bench.file("LOCK").exists()


def test_the_last_line_printed_is_json_with_the_directory(bench):
    bench.run()
    last = json.loads(bench.out.splitlines()[-1])
    assert last == {"run_dir": str(bench.folder / "results" / "run"), "exit_code": 0}
    assert all(letter == "\n" or letter.isprintable() for letter in bench.out + bench.err)


def test_a_rerun_of_a_finished_run_changes_nothing(bench):
    assert bench.run() == 0
    before = snapshot(bench.folder / "results")
    assert bench.run() == 0
    assert snapshot(bench.folder / "results") == before
    assert "spec_stream" in bench.out


def test_the_default_name_is_date_and_hash_and_is_found_again(bench):
    def words(*more):
        return [word for word in bench.words(*more) if word not in ("--run_name", "run")]

    assert dataset_tps.main(words(), loader=LOADER) == 0
    assert dataset_tps.main(words(), loader=LOADER) == 0
    (folder,) = (bench.folder / "results").iterdir()
    date, _, digest = folder.name.partition("_")
    assert len(digest) == 8
    (folder / "summary.json").unlink()
    folder.rename(folder.with_name(f"2020-01-01_{digest}"))
    assert dataset_tps.main(words(), loader=LOADER) == 0
    assert [path.name for path in (bench.folder / "results").iterdir()] == [f"2020-01-01_{digest}"]
    assert dataset_tps.main(words("--seed", "1"), loader=LOADER) == 0
    assert len(list((bench.folder / "results").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--limit", "0"], "--limit got 0"),
        (["--limt", "3"], "did you mean '--limit'"),
        (["--model_type", "spec_steam"], "did you mean 'spec_stream'"),
        (["--model_type", "naive+spec_stream"], "both decide 'decoder'"),
        (["--model_type", "flash"], "need a CUDA device"),
        (["--model_type", "flash,all"], "stands alone"),
        (["--model_type", "prompt_lookup", "--batch_size", "1,4"], "batch size 1 at most"),
        (["--model_type", "assisted"], "name one with --assistant_model"),
        (
            ["--model_type", "assisted", "--assistant_model", "/no/such"],
            "--assistant_model /no/such: no such",
        ),
        (
            ["--model_type", "all", "--assistant_model", "no-such-owner/no-such-model"],
            "--assistant_model no-such",
        ),
        (["--model_type", "assisted", "--num_assistant_tokens_schedule", "heuristic"], "heuristic_transient"),
        (["--model_type", "assisted", "--assistant_confidence_threshold", "much"], "expected a number"),
        (["--datasets", "jsonl"], "Give files with --data_dir"),
        (["--datasets", "spider", "--data_dir", __file__], "is not a folder"),
        (["--model_name_or_path", "/no/such/folder"], "no such directory"),
        (["--model_name_or_path", "no-such-owner/no-such-model"], "HF_HUB_OFFLINE"),
        (["--data_dir", "/no/such/folder"], "--data_dir /no/such/folder"),
        (["--datasets", "spyder"], "--datasets got 'spyder'"),
        (["--device", "cuda"], "0 CUDA devices"),
        (["--max_new_tokens", "-1"], "--max_new_tokens got -1"),
        (["--draft_nodes", "0"], "--draft_nodes got 0, expected auto or a number from 1 to 1024"),
        (["--draft_nodes", "100000"], "--draft_nodes got 100000, expected auto or a number from 1 to 1024"),
        (["--model_type", "naive", "--acceptance_sweep", "0.5"], "add spec_stream"),
    ],
)
def test_wrong_arguments_end_with_2_and_one_clear_line(bench, words, expected):
    started = time.monotonic()
    assert bench.run(*words) == 2
    lines = [line for line in bench.err.splitlines() if not line.startswith("INFO")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in bench.err
    assert time.monotonic() - started < 10


def test_a_draft_tree_has_at_most_as_many_nodes_as_the_model_has_positions(bench):
    write_checkpoint(bench.checkpoint, streams=4, max_position_embeddings=64)
    assert bench.run("--draft_nodes", "65") == 2
    assert "--draft_nodes got 65, expected at most 64" in bench.err
    assert len(bench.err.splitlines()) == 1
    assert not (bench.folder / "results").exists()
    assert bench.run("--draft_nodes", "64") == 0


@pytest.mark.parametrize("fault", ["truncated", "pickle", "auto_map", "no config"])
def test_a_corrupt_checkpoint_ends_with_1_before_any_worker_starts(bench, fault):
    if fault == "truncated":
        path = bench.checkpoint / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
    elif fault == "pickle":
        (bench.checkpoint / "model.safetensors").rename(bench.checkpoint / "pytorch_model.bin")
    elif fault == "auto_map":
        write_checkpoint(bench.checkpoint, auto_map={"AutoModel": "code.py"})
    else:
        (bench.checkpoint / "config.json").unlink()
    assert bench.run() == 1
    assert len(bench.err.splitlines()) == 1
    assert not (bench.folder / "results").exists()


def test_a_line_that_cannot_be_parsed_ends_with_1(bench):
    folder = bench.folder / "data" / "dialogsum"
    folder.mkdir(parents=True)
    (folder / "dialogsum.test.jsonl").write_text('{"dialogue": "a", "summary1": "b"}\n{"dialogue":\n')
    assert bench.run("--datasets", "dialogsum", "--data_dir", str(folder.parent)) == 1
    assert "dialogsum.test.jsonl" in bench.err
    assert "2" in bench.err
    assert not bench.file("worker_naive.log").exists()


def test_an_unusable_row_is_skipped_counted_and_ends_with_3(bench):
    folder = bench.folder / "data" / "dialogsum"
    folder.mkdir(parents=True)
    good = [{"fname": f"t{i}", "dialogue": f"hello {i}", "summary1": "w1 w2"} for i in range(3)]
    lines = [
        json.dumps(row) for row in [*good[:1], {"fname": "x", "dialogue": None, "summary1": "b"}, *good[1:]]
    ]
    (folder / "dialogsum.test.jsonl").write_text("\n".join(lines))
    assert bench.run("--datasets", "dialogsum", "--data_dir", str(folder.parent)) == 3
    (row,) = bench.summary()["skipped_rows"]["dialogsum"]
    assert row["index"] == 1
    assert bench.rows()["naive", "dialogsum", 1]["status"] == "ok"
    assert "rouge1" in str(bench.rows()["naive", "dialogsum", 1]["quality"])


def test_what_cannot_run_here_is_skipped_in_a_list(bench):
    assert bench.run("--model_type", "naive,flash,static") == 0
    row = bench.rows()["flash", "synthetic", 1]
    assert row["status"] == "skipped"
    assert "CUDA" in row["reason"]
    assert bench.run("--model_type", "all", "--run_name", "every") == 0
    names = {row["model_type"] for row in bench.summary("every")["rows"]}
    assert {
        "naive",
        "half",
        "flash",
        "no_cache",
        "kv_cache",
        "static",
        "prompt_lookup",
        "spec_stream",
    } <= names


def test_batch_sizes_that_a_technique_cannot_run_are_skipped_in_a_list(bench):
    words = ("--model_type", "naive,prompt_lookup", "--batch_size", "1,2")
    assert bench.run(*words) == 0
    row = bench.rows()["prompt_lookup", "synthetic", 2]
    assert (row["status"], row["reason"]) == ("skipped", "prompt_lookup runs at batch size 1 at most")
    assert bench.rows()["prompt_lookup", "synthetic", 1]["status"] == "ok"
    assert {(r["model_type"], r["batch_size"]) for r in bench.records()} == {
        ("naive", 1),
        ("naive", 2),
        ("prompt_lookup", 1),
    }
    before = snapshot(bench.folder / "results")
    assert bench.run(*words) == 0
    assert snapshot(bench.folder / "results") == before
    assert bench.run("--model_type", "naive,prompt_lookup", "--batch_size", "2", "--run_name", "two") == 0
    assert not bench.file("worker_prompt_lookup.log", "two").exists()


def test_an_assistant_drafts_where_one_is_named(bench):
    helper = write_checkpoint(bench.folder / "helper")
    assert bench.run("--model_type", "naive,assisted,static") == 0
    row = bench.rows()["assisted", "synthetic", 1]
    assert row["status"] == "skipped"
    assert "--assistant_model" in row["reason"]
    words = ("--model_type", "naive,assisted", "--assistant_model", str(helper), "--run_name", "helped")
    assert bench.run(*words) == 0
    naive, assisted = bench.summary("helped")["rows"]
    assert (assisted["status"], assisted["match_rate"], assisted["acceptance_length"]) == (
        "ok",
        1.0,
        pytest.approx(3, abs=1),
    )
    assert assisted["weight_bytes"] == naive["weight_bytes"] + len((helper / "config.json").read_bytes())
    config = json.loads(bench.file("config.json", "helped").read_text())
    assert config["assistant_model"] == str(helper)
    assert config["assistant_config"]["vocab_size"] == 100
    assert config["techniques"]["assisted"]["recipe"]["drafts"] == "assistant"
    assert bench.run("--model_type", "assisted", *words[2:4], "--run_name", "alone") == 0


def test_a_run_with_another_assistant_is_not_resumed(bench):
    helper = write_checkpoint(bench.folder / "helper")
    words = ("--model_type", "naive,assisted", "--assistant_model", str(helper))
    assert bench.run(*words) == 0
    assert bench.run(*words) == 0
    write_checkpoint(helper, hidden_size=8)
    assert bench.run(*words) == 2
    assert f"other weights in {bench.checkpoint} or {helper}" in bench.err


def test_an_assistant_of_another_vocabulary_ends_with_2_before_any_worker_starts(bench):
    helper = write_checkpoint(bench.folder / "helper", vocab_size=90)
    assert bench.run("--model_type", "naive,assisted", "--assistant_model", str(helper)) == 2
    assert "vocabulary of 90 tokens, the model one of 100" in bench.err
    assert len(bench.err.splitlines()) == 1
    assert not (bench.folder / "results").exists()
    # Nobody drafts with it: then it is not looked at.
    assert bench.run("--model_type", "naive,static", "--assistant_model", str(helper)) == 0


def test_the_runner_is_in_records_and_rows(bench):
    assert bench.run("--model_type", "naive,static") == 0
    row = bench.rows()["static", "synthetic", 1]
    assert (row["runner"], row["capture_s"], row["capture_bytes"]) == ("cuda graph", 0.5, 64)
    assert {record["runner"] for record in bench.records()} == {None, "cuda graph"}


def test_own_data_may_be_one_file(bench):
    path = bench.folder / "own data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "\\ud83d"}\n')
    assert bench.run("--datasets", "jsonl", "--data_dir", str(path)) == 0
    assert bench.rows()["naive", "jsonl", 1]["prompts"] == 2


def test_a_checkpoint_without_streams(bench):
    write_checkpoint(bench.checkpoint)
    assert bench.run("--model_type", "naive,spec_stream") == 0
    row = bench.rows()["spec_stream", "synthetic", 1]
    assert row["status"] == "skipped"
    assert "train_spec_stream.py" in row["reason"]
    assert bench.run("--run_name", "alone") == 2
    assert bench.run("--random_weights", "--run_name", "random") == 0
    assert all(row["random_weights"] for row in bench.summary("random")["rows"])


def test_warm_up_comes_before_and_is_kept_apart(bench):
    assert bench.run("--warmup", "2", "--batch_size", "1,2") == 0
    lines = [json.loads(line) for line in bench.file("warmup.jsonl").read_text().splitlines()]
    answers = {(line["model_type"], line["batch_size"]): 0 for line in lines}
    for line in lines:
        answers[line["model_type"], line["batch_size"]] += 1
    assert answers == {("naive", 1): 2, ("naive", 2): 4, ("spec_stream", 1): 2, ("spec_stream", 2): 4}
    assert len(bench.records()) == 2 * 2 * 3 * 2


def test_zero_and_one_new_tokens(bench):
    for count in (0, 1):
        assert bench.run("--max_new_tokens", str(count), "--run_name", str(count)) == 0
        assert {len(record["token_ids"]) for record in bench.records(str(count))} == {count}


def test_batches(bench):
    assert bench.run("--batch_size", "1,2", "--limit", "5") == 0
    batched = [record for record in bench.records() if record["batch_size"] == 2]
    assert {record["request_size"] for record in batched} == {1, 2}
    tokens = {
        (r["prompt_id"], r["batch_size"]): r["token_ids"]
        for r in bench.records()
        if r["model_type"] == "naive"
    }
    assert all(tokens[prompt, 2] == ids for (prompt, size), ids in tokens.items() if size == 1)


def test_divergences_are_saved_with_their_gap(bench):
    bench.environment.setenv("FAKE_DIFFERS", "engine:streams")
    assert bench.run() == 0
    row = bench.rows()["spec_stream", "synthetic", 1]
    assert (row["match_rate"], row["divergences"], row["divergence_gap_max"]) == (0.0, 3, 0.25)
    lines = [json.loads(line) for line in bench.file("divergences.jsonl").read_text().splitlines()]
    assert [(line["position"], line["token"] - line["baseline_token"], line["gap"]) for line in lines] == [
        (2, 1, 0.25)
    ] * 3
    assert bench.rows()["naive", "synthetic", 1]["exact_rate"] is None


def test_exactness_is_judged_against_the_twin(bench):
    assert bench.run("--model_type", "naive,static,spec_stream") == 0
    assert bench.rows()["spec_stream", "synthetic", 1]["exact_rate"] == 1.0
    assert bench.rows()["static", "synthetic", 1]["exact_rate"] is None


def test_groups_when_memory_is_short(bench):
    bench.environment.setenv("FAKE_FREE_BYTES", str(2200 << 20))
    assert bench.run("--model_type", "naive,static,spec_stream") == 0
    rows = [(row["model_type"], row["group"]) for row in bench.summary()["rows"]]
    assert rows == [("naive", 0), ("static", 0), ("naive", 1), ("spec_stream", 1)]
    assert json.loads(bench.file("config.json").read_text())["groups"] == [
        ["naive", "static"],
        ["naive", "spec_stream"],
    ]
    assert bench.summary()["rows"][3]["speedup"] > 1


def test_secrets_reach_no_file(bench):
    bench.environment.setenv("HF_TOKEN", "topsecrettoken")
    assert bench.run() == 0
    for path in (bench.folder / "results").rglob("*"):
        assert path.is_dir() or b"topsecrettoken" not in path.read_bytes()


def test_the_parent_imports_no_torch_and_help_is_quick():
    code = (
        "import sys, dataset_tps\ntry: dataset_tps.main(['--help'])\nexcept SystemExit as e: print(e.code)\n"
    )
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 2
    assert "--model_type" in done.stdout
    assert done.stdout.endswith("0\nFalse False\n")
