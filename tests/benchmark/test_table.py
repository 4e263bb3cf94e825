import io

import pytest

from benchmark.summary import SummaryRow
from benchmark.table import cut_prompts, is_terminal, print_table, quality

ROWS = [
    SummaryRow("naive", "e2e_nlg", 1, tokens_per_s=10.0, speedup=1.0, quality={"bleu": 12.345}).as_json(),
    SummaryRow("[bold]x", "e2e_nlg", 1, tokens_per_s=25.0, speedup=2.5, speedup_ci95=(2.0, 3.0)).as_json(),
    SummaryRow("flash", "e2e_nlg", 1, status="skipped", reason="no CUDA here").as_json(),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_away_from_a_terminal_there_are_no_control_characters():
    stream = io.StringIO()
    print_table(ROWS, "title", stream)
    text = stream.getvalue()
    assert "2.50x [2.00, 3.00]" in text
    assert "bleu 12.3" in text
    assert "flash on e2e_nlg, batch 1: skipped, no CUDA here" in text
    assert all(letter == "\n" or letter.isprintable() for letter in text)


def test_an_interval_that_holds_1_is_marked():
    stream = io.StringIO()
    unsure = SummaryRow("x", "e2e_nlg", 1, tokens_per_s=11.0, speedup=1.1, speedup_ci95=(0.9, 1.3)).as_json()
    print_table([ROWS[0], unsure], "title", stream)
    assert "1.10x* [0.90, 1.30]" in stream.getvalue()


def test_nodes_stand_with_their_source():
    stream = io.StringIO()
    tuned = SummaryRow("x", "e2e_nlg", 1, draft_nodes=10, draft_source="tuned at load").as_json()
    print_table([tuned], "title", stream)
    assert "10, tuned at load" in stream.getvalue()


def test_no_color_is_honoured(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_table(ROWS, "title", stream)
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_table_with_names_as_they_are(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    assert is_terminal(stream)
    monkeypatch.setenv("COLUMNS", "200")
    print_table(ROWS, "[title]", stream)
    assert "[bold]x" in stream.getvalue()
    assert "[title]" in stream.getvalue()


def test_a_summary_without_rows_prints_too():
    stream = io.StringIO()
    print_table([], "title", stream)
    assert "title" in stream.getvalue()


def test_prompts_that_were_cut_are_told_once_a_data_set():
    rows = [
        SummaryRow("naive", "spider", 1, prompts=8, prompts_truncated=3).as_json(),
        SummaryRow("static", "spider", 1, prompts=8, prompts_truncated=3).as_json(),
        SummaryRow("naive", "e2e_nlg", 1, prompts=8).as_json(),
    ]
    stream = io.StringIO()
    print_table(rows, "title", stream)
    (remark,) = [line for line in stream.getvalue().splitlines() if "lost their beginning" in line]
    assert remark.startswith("spider: 3 of 8 prompts ")
    assert cut_prompts(rows[2:]) == []


def test_quality_keeps_counts_whole_and_perplexities_to_five_figures():
    row = {"quality": {"rouge1": 0.12345, "n_executed": 1034, "perplexity_wikitext2": 1965.1557}}
    assert quality(row) == "rouge1 0.123, n_executed 1034, perplexity_wikitext2 1965.2"
    assert quality({}) == ""
