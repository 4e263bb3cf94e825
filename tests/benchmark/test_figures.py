"""Every figure renders from a saved run, and says why where it has nothing to draw."""

import builtins
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmark import figures
from benchmark.describe import dataset_label
from benchmark.figure_parts import speed_interval
from benchmark.saved_run import SavedRun, load_run

SAVED = Path(__file__).parents[1] / "data" / "saved_run"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def run() -> SavedRun:
    return load_run(SAVED)


def missing(run: SavedRun, folder: Path) -> dict[str, str | None]:
    drawn = figures.draw_figures(run, folder)
    assert all(item.path.read_bytes().startswith(PNG) for item in drawn)
    return {item.name: item.missing for item in drawn}


def changed(run: SavedRun, **fields: object) -> SavedRun:
    return replace(run, rows=tuple({**row, **fields} for row in run.rows))


def draw(name: str, run: SavedRun) -> Figure:
    figure = Figure()
    figures.FIGURES[name].draw(run, figure, figures.technique_colours(run.techniques))
    return figure


def with_sizes(run: SavedRun, *sizes: int, **fields: object) -> SavedRun:
    """Returns the run with its rows at further batch sizes, twice as fast for each prompt more."""
    more = (
        {**row, "batch_size": size, "tokens_per_s": row["tokens_per_s"] * 2 * size, "tokens_per_s_ci95": None}
        | fields
        for size in sizes
        for row in run.rows
    )
    return replace(run, rows=(*run.rows, *more))


def with_perplexity(run: SavedRun, values: dict[str, float], name: str = "perplexity_references") -> SavedRun:
    """Returns the run with a perplexity for the techniques named."""

    def judged(row):
        own = {name: values[row["model_type"]]} if row["model_type"] in values else {}
        return {**row, "quality": {**row["quality"], **own}}

    return replace(run, rows=tuple(judged(row) for row in run.rows))


JUDGED = {"naive": 10.0, "static": 10.5}


def test_a_full_run_fills_every_figure(run, tmp_path):
    run = with_perplexity(run, JUDGED)
    assert missing(with_sizes(run, 4), tmp_path) == dict.fromkeys(figures.FIGURES)
    assert {path.stem for path in tmp_path.iterdir()} == set(figures.FIGURES)


def test_no_successful_cell_is_said_in_every_figure(run, tmp_path):
    failed = replace(changed(with_sizes(run, 4), status="oom", tokens_per_s=None), prompts=())
    failed = replace(failed, sweep=tuple({**point, "tokens_per_s": None} for point in run.sweep))
    reasons = missing(failed, tmp_path)
    assert set(reasons) == {*figures.FIGURES} - {"memory"}  # there are not two techniques to compare
    assert all(reasons.values())
    assert "No cell" in str(reasons["tokens_per_s"])


def test_what_a_run_was_not_asked_for_leaves_no_file(run, tmp_path):
    missing(with_perplexity(with_sizes(run, 4), JUDGED), tmp_path)  # an earlier run of the same name
    assert set(missing(replace(run, sweep=()), tmp_path)) == {"tokens_per_s", "step_time", "prompts"}
    assert {path.stem for path in tmp_path.iterdir()} == {"tokens_per_s", "step_time", "prompts"}


def test_a_run_without_rows_renders(run, tmp_path):
    assert all(missing(replace(run, rows=(), sweep=(), prompts=()), tmp_path).values())


def test_each_missing_part_empties_its_own_figure_only(run, tmp_path):
    assert set(missing_names(changed(run, breakdown_s=None), tmp_path)) == {"step_time"}
    assert set(missing_names(replace(run, prompts=()), tmp_path)) == {"prompts"}


def missing_names(run: SavedRun, folder: Path) -> list[str]:
    return [name for name, reason in missing(run, folder).items() if reason]


def test_one_prompt_and_a_failed_cell_render(run, tmp_path):
    rows = (*run.rows[:-1], {**run.rows[-1], "status": "timeout", "tokens_per_s": None, "breakdown_s": None})
    assert not missing_names(replace(run, rows=rows, prompts=run.prompts[:1]), tmp_path)


def test_several_batch_sizes_get_a_panel_each(run):
    assert len(draw("tokens_per_s", with_sizes(run, 4)).axes) == 2
    assert len(draw("tokens_per_s", run).axes) == 1


def test_throughput_is_a_line_a_technique_over_doubling_batches(run):
    sized = with_sizes(run, 4, 16)
    panels = draw("throughput", sized).axes
    assert [axes.get_title(loc="left") for axes in panels] == [dataset_label(name) for name in sized.datasets]
    for dataset, axes in zip(sized.datasets, panels, strict=True):
        assert axes.get_xscale() == "log"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "4", "16"]
        assert [line.get_label() for line in axes.lines] == list(sized.techniques)
        for name, line in zip(sized.techniques, axes.lines, strict=True):
            expected = [sized.row(name, dataset, size)["tokens_per_s"] for size in (1, 4, 16)]
            assert list(line.get_xdata()) == [1, 4, 16]
            assert list(line.get_ydata()) == pytest.approx(expected)


def test_throughput_leaves_a_gap_where_a_batch_was_not_measured(run):
    sized = with_sizes(run, 4, status="oom", tokens_per_s=None)
    line = draw("throughput", sized).axes[0].lines[0]
    speed, gap = line.get_ydata()
    assert speed == run.rows[0]["tokens_per_s"]
    assert gap != gap


def test_the_bars_are_the_rows_speeds(run):
    (axes,) = draw("tokens_per_s", run).axes
    heights = sorted(round(bar.get_height(), 3) for bar in axes.patches)
    assert heights == sorted(round(row["tokens_per_s"], 3) for row in run.rows)


def test_a_stack_adds_up_to_the_breakdown(run):
    panels = draw("step_time", run).axes
    for dataset, axes in zip(run.datasets, panels, strict=True):
        drawn = sum(bar.get_width() for bar in axes.patches)
        rows = [row for row in run.rows if row["dataset"] == dataset]
        expected = sum(1e3 * sum(row["breakdown_s"].values()) / row["output_tokens"] for row in rows)
        assert drawn == pytest.approx(expected)


def test_a_bar_far_beyond_the_others_is_cut_and_says_so(run):
    first = {**run.rows[0], "breakdown_s": {"forward": 100 * sum(run.rows[0]["breakdown_s"].values())}}
    axes = draw("step_time", replace(run, rows=(first, *run.rows[1:]))).axes[0]
    assert any("cut" in text.get_text() for text in axes.texts)
    assert axes.get_xlim()[1] < max(bar.get_width() for bar in axes.patches)


def test_a_mark_is_a_technique_at_its_memory_and_decode_speed(run):
    judged = with_perplexity(run, JUDGED)
    figure = draw("memory", judged)
    panels = [axes for axes in figure.axes if axes.get_xlabel() == "GB of weights"]
    assert [axes.get_title(loc="left") for axes in panels] == [dataset_label(name) for name in run.datasets]
    for dataset, axes in zip(run.datasets, panels, strict=True):
        rows = {name: judged.row(name, dataset, 1) for name in run.techniques}
        known, hollow = axes.collections
        expected = [
            (row["weight_bytes"] / 1e9, row["decode_tokens_per_s"])
            for name, row in rows.items()
            if name in JUDGED
        ]
        assert known.get_offsets().tolist() == [pytest.approx(place) for place in expected]
        assert known.get_array().tolist() == list(JUDGED.values())
        assert known.get_clim() == (10.0, 10.5)
        assert len(hollow.get_offsets()) == len(rows) - len(JUDGED)
        assert len(hollow.get_facecolor()) == 0
        assert {text.get_text() for text in axes.texts} == set(rows)
        assert all(text.xyann[1] <= axes.get_ylim()[1] for text in axes.texts)


def test_names_of_like_marks_are_moved_apart(run):
    alike = with_perplexity(changed(run, decode_tokens_per_s=50.0, weight_bytes=10**9), JUDGED)
    levels = sorted(text.xyann[1] for text in draw("memory", alike).axes[0].texts)
    assert len(levels) == len(run.techniques)
    assert all(high - low > 1 for low, high in zip(levels, levels[1:], strict=False))


def test_a_collapsed_model_does_not_take_all_colours(run):
    figure = draw("memory", with_perplexity(run, {"naive": 10.0, "static": 900.0}, "perplexity_wikitext2"))
    assert figure.axes[0].collections[0].get_clim() == (10.0, 20.0)
    assert any("wikitext2" in axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("field", ["weight_bytes", "decode_tokens_per_s"])
def test_memory_is_drawn_where_two_techniques_have_all_of_it(run, tmp_path, field):
    assert "memory" not in missing(run, tmp_path)
    assert "memory" not in missing(with_perplexity(run, {"naive": 10.0}), tmp_path)
    judged = with_perplexity(run, JUDGED)
    assert missing(judged, tmp_path)["memory"] is None
    assert "memory" not in missing(changed(judged, **{field: None}), tmp_path)
    assert not (tmp_path / "memory.png").exists()


def test_an_own_interval_wins_over_the_scaled_one():
    row = {"tokens_per_s": 100.0, "speedup": 2.0, "speedup_ci95": [1.8, 2.2]}
    assert speed_interval(row) == pytest.approx((90.0, 110.0))
    assert speed_interval({**row, "tokens_per_s_ci95": [95, 104]}) == (95.0, 104.0)
    assert speed_interval({**row, "speedup_ci95": None}) is None


def test_a_technique_keeps_its_colour_whatever_else_is_in_the_run():
    alone = figures.technique_colours(["spec_stream"])
    among = figures.technique_colours(["naive", "int8", "spec_stream", "int4+spec_stream"])
    assert alone["spec_stream"] == among["spec_stream"]
    assert len(set(among.values())) == len(among)


def test_without_matplotlib_the_message_says_what_to_install(run, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(figures.FiguresUnavailable, match="pip install matplotlib"):
        figures.draw_figures(run, tmp_path)
