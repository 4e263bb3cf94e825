"""report.py from the outside: what it writes, what it refuses, and that model text stays text."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import report
from benchmark import rescore
from benchmark.figures import FIGURES, FiguresUnavailable
from benchmark.saved_run import load_run
from datasets_code import Example, LoadedSet, Prompt, Score

SAVED = Path(__file__).parent / "data" / "saved_run"
SHOWN = {*FIGURES} - {"throughput", "memory"}  # it has one batch size, and no perplexity
README = (
    "top\n<!-- figure:begin -->old<!-- figure:end -->\n<!-- results:begin -->old<!-- results:end -->\nend\n"
)


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED, tmp_path / "saved_run"))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def call(*words: object) -> int:
    try:
        return report.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_run_becomes_table_figures_and_page(run_dir, capsys):
    assert call(run_dir) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(run_dir / "report.html")
    assert {path.stem for path in (run_dir / "figures").glob("*.png")} == SHOWN
    row = next(row for row in load_run(run_dir).rows if row["model_type"] == "spec_stream")
    assert any("spec_stream" in line and f"{row['speedup']:.2f}x [" in line for line in out)


def test_the_page_fetches_nothing_and_runs_nothing(run_dir):
    call(run_dir)
    text = (run_dir / "report.html").read_text()
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"""<script|https?://|(src|href)=["'](?!data:)|style=["']""", text)
    assert text.count("data:image/png;base64,") == len(SHOWN)


def test_figures_follow_what_the_run_was_asked_for(run_dir):
    def ask(summary):
        del summary["acceptance_sweep"]
        for row in summary["rows"]:
            row["quality"]["perplexity_wikitext2"] = 20.0
        summary["rows"] += [row | {"batch_size": 4} for row in summary["rows"]]

    edit(run_dir / "summary.json", ask)
    assert call(run_dir) == 0
    drawn = {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert drawn == {*FIGURES} - {"acceptance_sweep"}
    assert "acceptance sweep" not in (run_dir / "report.html").read_text().lower()


def test_model_text_is_escaped(run_dir):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    lines = (run_dir / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"text": hostile} for line in lines]
    (run_dir / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    edit(run_dir / "config.json", lambda config: config.update(model_name_or_path=f"m{hostile}"))
    edit(
        run_dir / "summary.json",
        lambda s: s["rows"][0].update(status="error", reason=hostile, tokens_per_s=None),
    )
    assert call(run_dir) == 0
    text = (run_dir / "report.html").read_text()
    assert "<script" not in text and "<img src=x" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_first_difference_is_shown(run_dir):
    lines = (run_dir / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["model_type"] == "spec_stream":
            record["token_ids"][2] += 1
    (run_dir / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    call(run_dir)
    assert "differs from token 3 on" in (run_dir / "report.html").read_text()


def test_condensed_results_draw_the_same_and_hold_no_path_of_the_machine(run_dir, tmp_path):
    edit(run_dir / "config.json", lambda config: config.update(data_dir="/home/someone/data"))
    edit(
        run_dir / "environment.json",
        lambda env: env.update(hostname="box", note="hub:a/b at https://example.org/x/y"),
    )
    assert call(run_dir, "--condense", tmp_path / "images" / "results", "--model-label", "a small model") == 0
    folder = tmp_path / "images" / "results" / "saved_run"
    assert {path.name for path in folder.glob("*.json")} == {
        "summary.json",
        "config.json",
        "environment.json",
        "prompts.json",
    }
    assert not (folder / "report.html").exists()
    full, small = load_run(run_dir), load_run(folder)
    assert small.rows == full.rows and small.sweep == full.sweep
    assert [item.acceptance_length for item in small.prompts] == pytest.approx(
        [item.acceptance_length for item in full.prompts], rel=1e-4
    )
    assert small.prompts and not small.records
    assert small.config["data_dir"] == "data" and small.config["model_label"] == "a small model"
    assert (
        small.environment["note"] == "hub:a/b at https://example.org/x/y"
        and "hostname" not in small.environment
    )


def test_readme_regions_come_from_committed_results(run_dir, tmp_path):
    call(run_dir, "--condense", tmp_path / "images" / "results")
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert call("--readme", readme) == 0
    text = readme.read_text()
    assert "](images/results/saved_run/figures/tokens_per_s.png)" in text
    assert "old" not in text and text.startswith("top\n") and text.endswith("\nend\n")
    assert "| spec_stream |" in text
    call("--readme", readme)
    assert readme.read_text() == text, "filling twice changes nothing"


def test_a_readme_without_marks_is_left_alone(run_dir, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no marks\n")
    assert call(run_dir, "--readme", readme) == 2
    assert "results:begin" in capsys.readouterr().err
    assert readme.read_text() == "no marks\n"


def test_an_interval_that_holds_one_is_marked(run_dir, tmp_path):
    edit(run_dir / "summary.json", lambda s: s["rows"][1].update(speedup=1.02, speedup_ci95=[0.95, 1.1]))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    call(run_dir, "--readme", readme)
    assert "(1.02x\\*)" in readme.read_text() and "not distinguishable" in readme.read_text()


def test_a_failed_cell_keeps_the_report_and_shows_its_reason(run_dir):
    failed = {"status": "oom", "reason": "needs 9 GiB", "tokens_per_s": None}
    edit(run_dir / "summary.json", lambda s: s["rows"][-1].update(failed))
    assert call(run_dir) == 0
    assert "oom (needs 9 GiB)" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize("answers", [True, False], ids=["answers", "no answers"])
@pytest.mark.parametrize("rows", [[], None], ids=["no cell", "all failed"])
def test_nothing_measured_is_still_a_report(run_dir, rows, answers):
    def fail(summary):
        summary["acceptance_sweep"] = []
        if rows is None:
            for row in summary["rows"]:
                row.update(status="error", reason="broken", tokens_per_s=None)
        else:
            summary["rows"] = rows

    edit(run_dir / "summary.json", fail)
    if not answers:
        (run_dir / "records.jsonl").unlink()
    assert call(run_dir) == 0
    assert "No cell of this run was measured" in (run_dir / "report.html").read_text()


def test_several_runs_share_one_page(run_dir, tmp_path):
    other = Path(shutil.copytree(SAVED, tmp_path / "other"))
    assert call(run_dir, other, "--output_dir", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>saved_run</h2>" in text and "<h2>other</h2>" in text
    assert (tmp_path / "out" / "other" / "tokens_per_s.png").exists()


def test_a_torn_last_record_is_dropped(run_dir):
    whole = len(load_run(run_dir).records)
    with (run_dir / "records.jsonl").open("a") as file:
        file.write('{"model_type": "nai')
    assert len(load_run(run_dir).records) == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no run directory"),
        (("absent",), "no run directory at absent"),
        (("--htlm", "x"), "did you mean --html"),
        (("absent", "--model_label", "x"), "--condense"),
        (("absent", "--data_dir", "x"), "--score"),
        (("--readme", "absent/README.md"), "no results in"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("summary.json", None, "is missing"),
        ("summary.json", "{", "cannot be read"),
        ("summary.json", "[]", "expected an object"),
        ("summary.json", "{}", "no list under 'rows'"),
        ("summary.json", '{"rows": [{"dataset": "spider"}]}', "row 0 has no model_type"),
        (
            "summary.json",
            '{"rows": [{"model_type": "a", "dataset": "b", "batch_size": 1, "status": "ok", "tokens_per_s": "x"}]}',
            "'tokens_per_s' has a value of the wrong type",
        ),
        ("config.json", "no json", "cannot be read"),
        ("records.jsonl", '{"model_type": "naive"}\n', "line 1 of "),
        ("records.jsonl", "x\n{}\n", "records.jsonl cannot be parsed: delete that line"),
    ],
)
def test_an_unreadable_run_is_named_and_exits_2(run_dir, capsys, name, content, said):
    (run_dir / name).unlink() if content is None else (run_dir / name).write_text(content)
    assert call(run_dir) == 2
    error = capsys.readouterr().err
    assert name in error and said in error and error.count("\n") == 1


def test_without_matplotlib_tables_and_page_are_still_written(run_dir, monkeypatch, capsys):
    def absent(*_):
        raise FiguresUnavailable("figures need matplotlib: pip install matplotlib")

    monkeypatch.setattr(report, "draw_figures", absent)
    assert call(run_dir) == 3
    assert "pip install matplotlib" in capsys.readouterr().err
    assert "pip install matplotlib" in (run_dir / "report.html").read_text()


class Parrot:
    """A data set whose quality is the share of answers that start with a reference."""

    name = "parrot"
    ids: tuple[str, ...] = ()

    def load(self, split, data_dir, limit, seed, source):
        examples = [Example(name, Prompt("?"), ("answer",)) for name in self.ids]
        return LoadedSet(examples, "samples", [])

    def score(self, predictions, examples):
        hits = [text.startswith(item.references[0]) for text, item in zip(predictions, examples, strict=True)]
        return Score({"hits": sum(hits) / len(hits)})


def test_score_replaces_quality_from_saved_text(run_dir, monkeypatch):
    ids = tuple({record.prompt_id for record in load_run(run_dir).records})
    monkeypatch.setattr(Parrot, "ids", ids)
    monkeypatch.setattr(rescore, "get_dataset", lambda _: Parrot())
    assert call(run_dir, "--score") == 0
    assert all(row["quality"] == {"hits": 1.0} for row in load_run(run_dir).rows)


def test_score_keeps_perplexities(run_dir, monkeypatch):
    path = run_dir / "summary.json"
    summary = json.loads(path.read_text())
    for row in summary["rows"]:
        row["quality"] = {"old": 0.5, "perplexity_wikitext2": 20.0}
        row["quality_unavailable"] = {"old2": "why", "perplexity_references": "oom: full"}
    path.write_text(json.dumps(summary))
    monkeypatch.setattr(Parrot, "ids", tuple({record.prompt_id for record in load_run(run_dir).records}))
    monkeypatch.setattr(rescore, "get_dataset", lambda _: Parrot())
    assert call(run_dir, "--score") == 0
    for row in load_run(run_dir).rows:
        assert row["quality"] == {"hits": 1.0, "perplexity_wikitext2": 20.0}
        assert row["quality_unavailable"] == {"perplexity_references": "oom: full"}


def test_score_refuses_other_prompts_and_changes_nothing(run_dir, monkeypatch, capsys):
    before = (run_dir / "summary.json").read_text()
    monkeypatch.setattr(rescore, "get_dataset", lambda _: Parrot())
    assert call(run_dir, "--score") == 1
    assert "--data_dir" in capsys.readouterr().err
    assert (run_dir / "summary.json").read_text() == before


def test_score_needs_answers(run_dir, capsys):
    (run_dir / "records.jsonl").unlink()
    assert call(run_dir, "--score") == 1
    assert "records.jsonl" in capsys.readouterr().err


def test_importing_report_loads_neither_torch_nor_matplotlib():
    code = "import sys, report; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    root = Path(report.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"
