import pytest

from datasets_code import get_dataset

ROWS = 'mr,ref\r\n"name[A], eatType[pub]",A is a  pub.\r\n"name[B], eatType[pub]",B is a pub.\r\n'
ROWS += '"name[A], eatType[pub]",There is a pub called A.\r\n"name[C]"\r\n"name[B], eatType[pub]",\r\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "e2e_nlg").mkdir()
    for name in ("trainset", "devset", "testset_w_refs"):
        (tmp_path / "e2e_nlg" / f"{name}.csv").write_text(ROWS, encoding="utf-8-sig", newline="")
    return tmp_path


@pytest.mark.parametrize("split", ["validation", "test"])
def test_rows_of_one_meaning_become_one_example(folder, split):
    loaded = get_dataset("e2e_nlg").load(split, folder)
    assert [(item.prompt.text, item.references) for item in loaded.examples] == [
        ("Meaning: name[A], eatType[pub]\nText:", ("A is a pub.", "There is a pub called A.")),
        ("Meaning: name[B], eatType[pub]\nText:", ("B is a pub.",)),
    ]
    assert [(row.index, row.reason) for row in loaded.skipped] == [
        (3, "field 'ref' is missing"),
        (4, "field 'ref' is empty"),
    ]


def test_training_keeps_every_row(folder):
    loaded = get_dataset("e2e_nlg").load("train", folder)
    assert [item.references for item in loaded.examples] == [
        ("A is a pub.",),
        ("B is a pub.",),
        ("There is a pub called A.",),
    ]
    assert [item.id for item in loaded.examples] == ["train_0", "train_1", "train_2"]


def test_score_has_rouge_and_bleu(folder):
    dataset = get_dataset("e2e_nlg")
    examples = dataset.load("test", folder).examples
    score = dataset.score(["There is a pub called A.", "B is a pub."], examples)
    assert set(score.values) == set(dataset.metrics)
    assert score.values["rougeL"] == 1.0
    assert score.values["bleu"] == pytest.approx(100)
