"""One self-contained HTML page for any number of saved runs: no server, no script, nothing fetched.

Whatever a model wrote is text and stays text: every string passes through `escape`, and the page's content security
policy allows nothing but its own style sheet (by digest) and embedded images.
"""

import base64
import hashlib
import inspect
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from benchmark import metrics
from benchmark.condense import without_machine
from benchmark.describe import dataset_label, failures, remarks, setting_label, workload_label
from benchmark.divergence import first_difference
from benchmark.figures import Drawn
from benchmark.records import OK, Record
from benchmark.report_tables import UNSURE, UNSURE_NOTE, Table, detail_table, headline_table, number
from benchmark.saved_run import SavedRun

PROMPTS_SHOWN = 16
DEFINITIONS = {
    "tokens/s": metrics.tokens_per_s,
    "decode tokens/s": metrics.decode_tokens_per_s,
    "acceptance length": metrics.acceptance_length,
    "TTFT": metrics.ttft_s,
    "TPOT": metrics.tpot_s,
}
OTHER_DEFINITIONS = {
    "over repeats": "every speed is pooled over the prompts of a repeat; the median over repeats is shown",
    "speed-up": "ratio to the baseline of the same group; 95 % interval from a bootstrap paired by prompt",
    "same text": "share of prompts whose whole token sequence equals the baseline's",
    "gap": "largest top-1/top-2 logit gap of the baseline at a first difference: a small one means rounding decided",
    "same as own model": "share of prompts whose tokens equal the same recipe's without its drafts",
    "perplexity": "exp of the mean negative log-likelihood of a token, pooled over tokens: of WikiText-2's raw test text in "
    "windows, of references after their prompts; measured after all that is timed",
    "acceptance ratio": "in the sweep: the probability that a depth of the draft tree holds the right token",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --soft: #f3f3f3; --line: #cccccc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --soft: #232323; --line: #444444; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.texts td { text-align: left; white-space: pre-wrap; vertical-align: top; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; background: #ffffff; }
figcaption, .note { color: inherit; opacity: .8; font-size: .92rem; }
details { margin: .4rem 0; padding: .4rem .8rem; background: var(--soft); border-radius: .3rem; }
summary { cursor: pointer; }
dt { font-weight: 600; }
"""


def page(runs: Sequence[tuple[SavedRun, Sequence[Drawn]]], no_figures: str | None = None) -> str:
    """Returns the page.

    Args:
        runs: each run with its figures on disk.
        no_figures: why there are no figures at all, if so.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(_run_section(run, figures, no_figures) for run, figures in runs)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Decoding benchmark</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Decoding benchmark</h1>\n{body}\n{_definitions()}\n</body>\n</html>\n"
    )


def _run_section(run: SavedRun, figures: Sequence[Drawn], no_figures: str | None) -> str:
    parts = [
        f"<h2>{escape(run.name)}</h2>",
        f"<p>{escape(setting_label(run))}<br>{escape(workload_label(run))}</p>",
    ]
    if not run.ok_rows():
        parts.append("<p><strong>No cell of this run was measured.</strong></p>")
    for size in run.batch_sizes if run.ok_rows() else ():
        headline = headline_table(run, size)
        parts += [f"<h3>Tokens/s, batch {size} (ratio to {escape(run.baseline)})</h3>", _table(headline)]
        if any(UNSURE in cell for row in headline for cell in row):
            parts.append(f'<p class="note">{escape(_plain(UNSURE_NOTE))}</p>')
    parts += [_list("Not measured", failures(run)), _list("Remarks", remarks(run))]
    parts += (
        [f'<p class="note">{escape(no_figures)}</p>'] if no_figures else [_figure(drawn) for drawn in figures]
    )
    parts += ["<h3>All quantities</h3>", _table(detail_table(run)), _prompts(run), _environment(run)]
    return "\n".join(("<section>", *parts, "</section>"))


def _table(table: Table, kind: str = "scroll") -> str:
    header, *rows = table
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ("".join(f"<td>{escape(_plain(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _plain(cell: str) -> str:
    return cell.replace(UNSURE, "*")


def _list(title: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<h3>{title}</h3><ul>{items}</ul>" if items else ""


def _figure(drawn: Drawn) -> str:
    data = base64.b64encode(drawn.path.read_bytes()).decode()
    words = drawn.caption + (f" Empty here: {drawn.missing}" if drawn.missing else "")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(drawn.caption)}">'
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def _prompts(run: SavedRun) -> str:
    """Returns each prompt's answers side by side, first repeat; a note where the run has no answers."""
    answers: dict[str, dict[str, dict[str, Record]]] = defaultdict(lambda: defaultdict(dict))
    for record in run.records:
        if record.status == OK and record.batch_size in run.batch_sizes[:1]:
            answers[record.dataset][record.prompt_id].setdefault(record.model_type, record)
    if not answers:
        return '<p class="note">This folder holds no answers (records.jsonl), so none are shown.</p>'
    parts = ["<h3>Answers</h3>"]
    for dataset, prompts in answers.items():
        shown = list(prompts.items())[:PROMPTS_SHOWN]
        parts.append(f"<h4>{escape(dataset_label(dataset))}, {len(shown)} of {len(prompts)} prompts</h4>")
        parts += [_answers(prompt_id, own, run.baseline) for prompt_id, own in shown]
    return "\n".join(parts)


def _answers(prompt_id: str, own: Mapping[str, Record], baseline: str) -> str:
    header = ["technique", "tokens", "tokens/s", "tokens / step", "same text", "text"]
    rows = [_answer(name, record, own.get(baseline)) for name, record in own.items()]
    return (
        f"<details><summary>{escape(prompt_id)}</summary>{_table([header, *rows], 'scroll texts')}</details>"
    )


def _answer(name: str, record: Record, base: Record | None) -> list[str]:
    count = len(record.token_ids)
    return [
        name,
        str(count),
        number(count / record.total_s if record.total_s else None),
        number((count - 1) / len(record.steps) if record.steps and count > 1 else None),
        "" if base is None or base is record else _agreement(record.token_ids, base.token_ids),
        record.text.strip(),
    ]


def _agreement(tokens: Sequence[int], base: Sequence[int]) -> str:
    place = first_difference(tokens, base)
    return "yes" if place is None else f"differs from token {place + 1} on"


def _environment(run: SavedRun) -> str:
    entries = _flatten(without_machine(run.environment)) + _flatten(without_machine(run.config))
    if not entries:
        return '<p class="note">This run saved neither environment.json nor config.json.</p>'
    table = _table([["key", "value"], *entries], "scroll texts")
    return f"<details><summary>Environment and configuration</summary>{table}</details>"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    entries: list[list[str]] = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            entries += _flatten(item, f"{prefix}{key}.")
        else:
            entries.append([f"{prefix}{key}", _words(item)])
    return entries


def _words(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, Iterable) and not isinstance(value, str)
        else str(value)
    )


def _definitions() -> str:
    """Returns the definitions, quoted from the functions that compute them."""
    quoted = {
        name: " ".join((inspect.getdoc(function) or "").split()) for name, function in DEFINITIONS.items()
    }
    entries = (quoted | OTHER_DEFINITIONS).items()
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in entries)
    return f"<section><h2>Definitions</h2><dl>{items}</dl></section>"
