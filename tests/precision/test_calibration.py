"""Text cut into samples: two halves without a common token, and what gives none."""

import pytest

from datasets_code import DataError, Dataset, MissingDataError
from precision.calibration import Text, cut, read_text


def letters(text):
    return [ord(letter) for letter in text]


def follow(_prompt, text):
    return letters(text)


def halves(text, tokens=100, window=4, positions=16):
    return cut(text, letters, follow, tokens, window, positions)


def test_a_running_text_is_cut_into_windows_that_take_turns():
    study, judge = halves(Text("abcdefghijklmnopqr", (), ""))
    assert [(one.prompt_ids, one.token_ids) for one in study] == [
        (letters("a"), letters("bcd")), (letters("i"), letters("jkl"))
    ]  # fmt: skip
    assert [one.prompt_ids for one in judge] == [letters("e"), letters("m")]


def test_tokens_end_each_half():
    study, judge = halves(Text("abcdefgh" * 9, (), ""), tokens=4)
    assert [sum(len(one.token_ids) for one in half) for half in (study, judge)] == [6, 6]


def test_only_what_follows_a_prompt_is_judged():
    pairs = (("ab", "cd"), ("", "no prompt"), ("x" * 30, "yz"), ("p", "q" * 30))
    study, judge = halves(Text("", pairs, ""))
    assert (study[0].prompt_ids, study[0].token_ids) == (letters("ab"), letters("cd"))
    assert (judge[0].prompt_ids, judge[0].token_ids) == (letters("x" * 14), letters("yz"))
    assert (study[1].prompt_ids, study[1].token_ids) == (letters("p"), letters("q" * 15))


@pytest.mark.parametrize(
    "text", [Text("abcdefg", (), ""), Text("", (("a", "b"),), ""), Text("", (("", "b"), ("", "c")), "")]
)
def test_too_little_text_is_refused(text):
    with pytest.raises(ValueError, match="the calibration text"):
        halves(text)


def test_sources(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("some text")
    assert read_text(str(file), None) == Text("some text", (), "own.txt")
    file.write_text(" \n")
    with pytest.raises(ValueError, match="holds no calibration text"):
        read_text(str(file), None)
    with pytest.raises(DataError, match="cannot be read"):
        read_text(str(tmp_path / "none.txt"), None)
    with pytest.raises(MissingDataError, match="wikitext-2"):
        read_text("wikitext2", tmp_path)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "wiki.test.raw").write_text(" = A title = \n")
    assert "A title" in read_text("wikitext2", tmp_path).running


def test_a_fingerprint_is_the_text():
    assert Text("a", (), "x").fingerprint == Text("a", (), "y").fingerprint
    assert Text("a", (), "").fingerprint != Text("b", (), "").fingerprint


def test_references_are_of_the_split_asked_for(monkeypatch):
    asked, real = [], Dataset.load

    def load(self, split, *rest):
        asked.append(split)
        return real(self, split, *rest)

    monkeypatch.setattr(Dataset, "load", load)
    assert read_text("references", None).pairs
    assert read_text("references", None, "train").pairs
    assert asked == ["validation"] * 3 + ["train"] * 3
