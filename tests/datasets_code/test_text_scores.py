import builtins
import math

import pytest

from datasets_code.text_scores import bleu, rouge


def test_rouge_by_hand():
    # 'the cat sat' against 'the cat ran': 2 of 3 words, 1 of 2 pairs, longest common sequence 2.
    values = rouge(["the cat sat"], [["the cat ran"]]).values
    assert values["rouge1"] == pytest.approx(2 / 3)
    assert values["rouge2"] == pytest.approx(1 / 2)
    assert values["rougeL"] == pytest.approx(2 / 3)


def test_rouge_takes_precision_and_recall():
    # 1 of 2 words predicted, 1 of 4 wanted: F = 2 * 1/2 * 1/4 / (1/2 + 1/4).
    assert rouge(["red dog"], [["red cat on mat"]]).values["rouge1"] == pytest.approx(1 / 3)


def test_rouge_stems():
    assert rouge(["dogs running"], [["dog runs"]]).values["rouge1"] == 1.0


def test_rouge_takes_the_best_reference_of_each_answer_then_the_mean():
    score = rouge(["a b", "x"], [["c d", "a b"], ["y", "z"]])
    assert score.values["rouge1"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("prediction", "reference"), [("", "a b"), ("a b", ""), ("", ""), ("?!", "a b"), (" \n", "a")]
)
def test_empty_texts_score_zero(prediction, reference):
    for score in (rouge([prediction], [[reference]]), bleu([prediction], [[reference]])):
        assert score.unavailable == {}
        assert all(value == 0 and not math.isnan(value) for value in score.values.values())


def test_bleu_of_the_reference_is_100_and_the_signature_is_noted():
    score = bleu(
        ["the small pub by the river is cheap"], [["other words here", "the small pub by the river is cheap"]]
    )
    assert score.values["bleu"] == pytest.approx(100)
    assert "tok:13a" in score.notes["bleu"]


def test_bleu_by_hand():
    # 5 words of 6: precisions 5/5, 4/4, 3/3, 2/2; brevity exp(1 - 6/5).
    score = bleu(["a b c d e"], [["a b c d e f"]])
    assert score.values["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_takes_different_numbers_of_references():
    score = bleu(
        ["one two three four", "five six seven eight"],
        [["one two three four"], ["no", "five six seven eight"]],
    )
    assert score.values["bleu"] == pytest.approx(100)


def test_numbers_of_answers_and_examples_must_agree():
    with pytest.raises(ValueError, match="2 answers for 1 examples"):
        rouge(["a", "b"], [["a"]])


def test_no_answer_gives_a_reason():
    assert rouge([], []).unavailable["rouge1"] == "there is no answer to score"
    assert bleu([], []).unavailable["bleu"] == "there is no answer to score"


def test_missing_package_gives_a_reason(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith(("rouge_score", "sacrebleu")):
            raise ImportError(name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    score = rouge(["a"], [["a"]]).merged(bleu(["a"], [["a"]]))
    assert score.values == {}
    assert score.unavailable["rougeL"] == "package 'rouge-score' is not installed; pip install rouge-score"
    assert score.unavailable["bleu"] == "package 'sacrebleu' is not installed; pip install sacrebleu"
