"""Turns saved results into tables, figures and one HTML page. Measures nothing, loads no model, needs no device.

python report.py results/<run_name>                             table, figures/*.png and report.html in that folder
python report.py results/<run_name> --condense images/results   the small part that is committed, with its figures
python report.py RUN_DIR ... --readme README.md                 the README's tables and figure; docs/measurement.md has the call
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmark.condense import condense
from benchmark.describe import setting_label
from benchmark.errors import EXIT_DONE, EXIT_FAILED, EXIT_INCOMPLETE, EXIT_USAGE
from benchmark.figures import Drawn, FiguresUnavailable, draw_figures, technique_colours
from benchmark.files import write_atomically
from benchmark.report_page import page
from benchmark.report_tables import update_readme
from benchmark.rescore import ScoreError, rescore
from benchmark.saved_run import ResultsError, SavedRun, load_run
from benchmark.table import print_table

COMMITTED_RESULTS = Path("images/results")
EXIT_CODES = """exit codes: 0 done; 1 the report could not be written; 2 bad arguments, or a run directory that is missing
or unreadable; 3 written, but without figures (matplotlib is missing)"""


@dataclass(frozen=True)
class Request:
    """The flags of one call."""

    run_dirs: tuple[Path, ...]
    output_dir: Path | None
    html: Path | None
    condense: Path | None
    model_label: str | None
    readme: Path | None
    score: bool
    data_dir: Path | None


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2 after one line."""
        self.exit(EXIT_USAGE, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one call and returns its exit code."""
    request = parse(sys.argv[1:] if argv is None else argv)
    try:
        return report(request)
    except ResultsError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USAGE
    except (ScoreError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_FAILED


def parse(argv: Sequence[str]) -> Request:
    """Returns the flags of a command line; `-` and `_` are the same in a flag."""
    parser = Parser(
        prog="report.py",
        description="Saved results -> tables, figures and one self-contained HTML page.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dirs", nargs="*", type=Path, metavar="RUN_DIR", help="folders that dataset_tps.py wrote"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="figures go to OUTPUT_DIR/<run_name>/ [each run's own figures/]"
    )
    parser.add_argument(
        "--html",
        type=Path,
        help="file of the page [report.html in --output_dir, else in the first run; none with --readme or --condense]",
    )
    parser.add_argument(
        "--condense", type=Path, metavar="DEST", help="copy the committed part to DEST/<run_name>/"
    )
    parser.add_argument(
        "--model_label", help="with --condense: the model in words, quoted by figures and tables"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        help=f"fill this file's marked regions [without RUN_DIR: from {COMMITTED_RESULTS}/*]",
    )
    parser.add_argument("--score", action="store_true", help="compute quality again from the saved answers")
    parser.add_argument("--data_dir", type=Path, help="with --score: folder with the official release files")
    given, unknown = parser.parse_known_args([_with_underscores(word) for word in argv])
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(parser._option_string_actions), n=1)
        parser.error(
            f"unknown argument '{unknown[0]}'" + (f": did you mean {near[0]}?" if near else "; see --help")
        )
    request = Request(**{**vars(given), "run_dirs": tuple(given.run_dirs)})
    if not request.run_dirs and request.readme is None:
        parser.error("no run directory: give one or more folders such as results/<run_name>")
    if request.model_label and request.condense is None:
        parser.error("--model_label is stored by --condense DEST: add it")
    if request.data_dir and not request.score:
        parser.error("--data_dir is read by --score: add it")
    return request


def _with_underscores(word: str) -> str:
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def report(request: Request) -> int:
    """Loads, scores and condenses as asked, writes figures, page and README, prints the tables; returns the exit code."""
    paths = request.run_dirs or committed_runs(request.readme)
    if request.score:
        for path in paths:
            rescore(load_run(path), request.data_dir)
    if request.condense:
        paths = tuple(condense(load_run(path), request.condense, request.model_label) for path in paths)
    runs = [load_run(path) for path in paths]
    figures, no_figures = draw_all(runs, request.output_dir)
    for run in runs:
        print_table(run.rows, f"{run.name}: {setting_label(run)}")
    if request.readme:
        drawn = next(
            (item.path for item in figures[0] if item.name == "tokens_per_s" and not item.missing), None
        )
        write_atomically(request.readme, update_readme(request.readme, runs, drawn))
    html = page_path(request, runs)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(html, page(list(zip(runs, figures, strict=True)), no_figures))
    if no_figures:
        sys.stderr.write(f"warning: {no_figures}\n")
    sys.stdout.write(f"{html or request.readme or paths[0]}\n")
    return EXIT_INCOMPLETE if no_figures else EXIT_DONE


def committed_runs(readme: Path | None) -> tuple[Path, ...]:
    """Returns the folders of committed results beside a README, by name.

    Raises:
        ResultsError: there is none.
    """
    folder = (readme.parent if readme else Path()) / COMMITTED_RESULTS
    found = tuple(sorted(path.parent for path in folder.glob("*/summary.json")))
    if not found:
        raise ResultsError(
            f"no results in {folder}: put some there with report.py results/<run_name> --condense {folder}"
        )
    return found


def draw_all(runs: Sequence[SavedRun], output_dir: Path | None) -> tuple[list[list[Drawn]], str | None]:
    """Draws every run's figures with one set of colours; returns them, and why there are none if matplotlib is absent."""
    colours = technique_colours(name for run in runs for name in run.techniques)
    folders = [output_dir / run.name if output_dir else run.path / "figures" for run in runs]
    try:
        return [draw_figures(run, folder, colours) for run, folder in zip(runs, folders, strict=True)], None
    except FiguresUnavailable as error:
        return [[] for _ in runs], str(error)


def page_path(request: Request, runs: Sequence[SavedRun]) -> Path | None:
    """Returns where the page goes: a README or a condensed copy gets one only on request."""
    if request.html or request.readme or request.condense:
        return request.html
    return (request.output_dir or runs[0].path) / "report.html"


if __name__ == "__main__":
    sys.exit(main())
