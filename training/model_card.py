"""The model card: what the model is, what it was trained on and under which licences, and what was measured."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass

from training.arguments import TrainingFlags, command_of
from training.calibration import Calibration
from training.data import OWN_SET


@dataclass(frozen=True)
class SetInfo:
    """Name, paper and licence of a public data set."""

    title: str
    paper: str
    licence: str


PUBLIC_SETS = {
    "spider": SetInfo("Spider", "Yu et al., EMNLP 2018", "CC BY-SA 4.0"),
    "dialogsum": SetInfo(
        "DialogSum", "Chen et al., Findings of ACL 2021", "CC BY-NC-SA 4.0 (non-commercial)"
    ),
    "e2e_nlg": SetInfo("E2E-NLG", "Novikova et al., SIGDIAL 2017", "CC BY-SA 4.0"),
}


@dataclass(frozen=True)
class RunFacts:
    """What a finished run says of itself.

    Attributes:
        architecture: class of the main model.
        parameters, stream_parameters: sizes; the streams are part of the first number.
        vocab_size: tokens.
        sets: (name, source, training examples seen as text, skipped) by set.
        steps, minutes: length of the training loop.
        device: what it ran on.
        dtype: of the saved weights.
        calibration: measured on held-out prompts; None where it was left out.
    """

    architecture: str
    parameters: int
    stream_parameters: int
    vocab_size: int
    sets: Sequence[tuple[str, str, int, int]]
    steps: int
    minutes: float
    device: str
    dtype: str
    calibration: Calibration | None


def model_card(flags: TrainingFlags, facts: RunFacts, today: datetime.date | None = None) -> str:
    """Returns the README of a trained model."""
    date = (today or datetime.date.today()).isoformat()
    parts = [
        front_matter(flags, facts),
        f"# {flags.output_dir.name}",
        introduction(flags),
        f"- architecture: {facts.architecture}, {facts.parameters:,} parameters, {facts.stream_parameters:,} of them "
        f"streams; vocabulary {facts.vocab_size:,}; weights in {facts.dtype}\n"
        f"- trained on {date}: {facts.steps:,} steps in {facts.minutes:.1f} minutes on {facts.device}",
        f"Command:\n\n    {command_of(flags)}",
        data_section(facts),
        measured_section(facts.calibration),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(flags: TrainingFlags, facts: RunFacts) -> str:
    """Returns the card's metadata block."""
    names = [name for name, *_ in facts.sets]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [speculative-streaming]",
    ]
    public = [name for name in names if name in PUBLIC_SETS]
    if public:
        licence = "cc-by-nc-sa-4.0" if "dialogsum" in public else "cc-by-sa-4.0"
        lines += [f"license: {licence}", f"datasets: [{', '.join(public)}]"]
    if flags.mode != "scratch":
        lines.append(f"base_model: {flags.model_name_or_path}")
    return "\n".join([*lines, "---"])


def introduction(flags: TrainingFlags) -> str:
    """Returns what was trained, in a sentence or two."""
    start = {
        "scratch": "A small language model trained from random weights together with its streams",
        "joint": f"`{flags.model_name_or_path}` trained further together with streams",
        "adapter": f"Streams for `{flags.model_name_or_path}`, whose own weights are unchanged",
    }[flags.mode]
    return (
        f"{start}. The streams let it draft and verify several tokens in one pass (Speculative Streaming, arXiv 2402.11131); "
        "the text is that of ordinary decoding."
    )


def data_section(facts: RunFacts) -> str:
    """Returns the data table with licences."""
    lines = ["## Data", "", "| set | examples | source | licence |", "| --- | ---: | --- | --- |"]
    for name, source, count, skipped in facts.sets:
        info = PUBLIC_SETS.get(name)
        title = f"{info.title} ({info.paper})" if info else ("own file" if name == OWN_SET else name)
        note = f" ({skipped} skipped)" if skipped else ""
        lines.append(
            f"| {title} | {count:,}{note} | {source.split(':')[0]} | {info.licence if info else 'own'} |"
        )
    if any(name == "dialogsum" for name, *_ in facts.sets):
        lines += ["", "Because of DialogSum's licence the weights are for non-commercial use."]
    return "\n".join(lines)


def measured_section(calibration: Calibration | None) -> str:
    """Returns the acceptance table, or nothing where nothing was measured."""
    if calibration is None:
        return ""
    nodes = list(next(iter(calibration.sets.values())).acceptance_length)
    head = ["set", "prompts", "rank-1 accuracy by stream", *(f"{count} draft nodes" for count in nodes)]
    lines = [
        "## Acceptance, measured",
        "",
        "On held-out prompts (none of them in a test set), continued greedily by the model itself. Acceptance length: "
        "tokens a decode step emits, bonus token included; draft nodes count the root.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] + ['---:'] * (len(head) - 1))} |",
    ]
    for name, part in calibration.sets.items():
        first = " / ".join(f"{ranks[0]:.2f}" for ranks in part.rank_accuracy)
        lengths = [f"{value:.2f}" if value is not None else "" for value in part.acceptance_length.values()]
        lines.append(f"| {' | '.join([name, str(part.prompts), first, *lengths])} |")
    return "\n".join(lines)
