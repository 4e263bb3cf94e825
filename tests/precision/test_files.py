"""The folder of a study: nothing before it begins, one basis, torn lines."""

import pytest

from benchmark.errors import UsageError
from precision.files import POINTS, UNITS, StudyFiles

BASIS = {"model": "abc", "tokens": 10}


def begun(folder, **changes):
    files = StudyFiles(folder, resume=changes.pop("resume", True))
    files.check(BASIS | changes)
    files.begin(BASIS | changes, {})
    return files


def append(files, name, *rows):
    appender = files.appender(name)
    appender.append(list(rows))
    appender.close()


def test_checking_writes_nothing(tmp_path):
    StudyFiles(tmp_path / "new", resume=True).check(BASIS)
    assert not (tmp_path / "new").exists()


def test_lines_are_found_again_but_for_a_torn_one(tmp_path):
    append(begun(tmp_path), UNITS, {"unit": "a"}, {"unit": "b"})
    with (tmp_path / UNITS).open("a") as file:
        file.write('{"unit": "c", "nl')
    again = begun(tmp_path)
    assert again.lines(UNITS) == [{"unit": "a"}, {"unit": "b"}]
    append(again, UNITS, {"unit": "c"})
    assert [row["unit"] for row in begun(tmp_path).lines(UNITS)] == ["a", "b", "c"]


def test_another_basis_is_refused_and_may_start_anew(tmp_path):
    append(begun(tmp_path), POINTS, {"plan": "x"})
    with pytest.raises(UsageError, match=r"tokens 10 -> 20.*--no-resume"):
        StudyFiles(tmp_path, resume=True).check(BASIS | {"tokens": 20})
    assert begun(tmp_path, tokens=20, resume=False).lines(POINTS) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 0}'])
def test_a_folder_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="is no study's of this version"):
        StudyFiles(tmp_path, resume=True).check(BASIS)


def test_lines_without_a_basis_are_refused(tmp_path):
    (tmp_path / UNITS).write_text("")
    with pytest.raises(UsageError, match="has units.jsonl but no config.json"):
        StudyFiles(tmp_path, resume=True).check(BASIS)
