"""ROUGE and BLEU of answers against one or more references.

ROUGE is rouge-score's with Porter stemming; each answer takes the best F-measure over its references, for
each kind on its own, and the set takes the mean (0 to 1). BLEU is sacrebleu's corpus BLEU against all
references (0 to 100). Both packages are imported on use: where one is missing, its metrics are left out with
the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets_code.base import Score

ROUGE = ("rouge1", "rouge2", "rougeL")
BLEU = ("bleu",)


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Returns the mean over answers of the best ROUGE F-measure over references; an empty answer counts 0."""
    check_pairs(predictions, references)
    if not predictions:
        return absent(ROUGE, "there is no answer to score")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return absent(ROUGE, "package 'rouge-score' is not installed; pip install rouge-score")
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    totals = dict.fromkeys(ROUGE, 0.0)
    for prediction, texts in zip(predictions, references, strict=True):
        scores = [scorer.score(text, prediction) for text in texts]
        for kind in ROUGE:
            totals[kind] += max((float(score[kind].fmeasure) for score in scores), default=0.0)
    values: dict[str, float | int] = {kind: total / len(predictions) for kind, total in totals.items()}
    return Score(values, notes={"rouge": "best F-measure over references, Porter stemmer, mean over answers"})


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Returns corpus BLEU; answers may have different numbers of references, but each needs one."""
    check_pairs(predictions, references)
    if not predictions:
        return absent(BLEU, "there is no answer to score")
    if not all(references):
        return absent(BLEU, "an answer has no reference")
    try:
        from sacrebleu.metrics import BLEU as CorpusBleu
    except ImportError:
        return absent(BLEU, "package 'sacrebleu' is not installed; pip install sacrebleu")
    streams: list[Any] = [  # sacrebleu takes None for a reference that an answer lacks
        [texts[number] if number < len(texts) else None for texts in references]
        for number in range(max(len(texts) for texts in references))
    ]
    metric = CorpusBleu()
    answers = [prediction.strip() for prediction in predictions]
    score = metric.corpus_score(answers, streams)
    return Score({"bleu": float(score.score)}, notes={"bleu": str(metric.get_signature())})


def check_pairs(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError if answers and references differ in number."""
    if len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} answers for {len(references)} examples; give one answer an example."
        )


def absent(metrics: Sequence[str], reason: str) -> Score:
    """Returns a score in which each of the metrics is unavailable for one reason."""
    return Score(unavailable=dict.fromkeys(metrics, reason))
