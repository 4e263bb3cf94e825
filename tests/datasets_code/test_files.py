import json

import pytest

from datasets_code.files import read_csv, read_json_array, read_json_lines
from datasets_code.sources import DataError, MissingDataError


def test_json_lines_take_bom_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "caf\xc3\xa9 \\ud800"}\r\n')
    assert read_json_lines(path) == [{"a": 1}, {"a": "café \ud800"}]


@pytest.mark.parametrize("line", ["{", "{'a': 1}", '{"a": 1} x', "nonsense", "[" * 100_000, "1" * 5000])
def test_json_line_that_cannot_be_parsed_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not valid JSON .*; fix or delete the line"):
        read_json_lines(path)


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not UTF-8"):
        read_json_lines(path)


def test_missing_file_is_told_apart(tmp_path):
    with pytest.raises(MissingDataError, match="not found"):
        read_json_lines(tmp_path / "none.jsonl")
    with pytest.raises(MissingDataError, match="not found"):
        read_json_array(tmp_path)


def test_json_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('\ufeff[{"a": 1}]', encoding="utf-8")
    assert read_json_array(path) == [{"a": 1}]
    path.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=1)[:-5])
    with pytest.raises(DataError, match=r"rows\.json:6: not valid JSON"):
        read_json_array(path)
    path.write_text("{}")
    with pytest.raises(DataError, match="expected a JSON array"):
        read_json_array(path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"rows\.json:1: not readable as JSON"):
        read_json_array(path)


def test_csv_takes_bom_windows_line_ends_and_breaks_inside_quotes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfmr,ref\r\n"a, b","one\r\ntwo ""x"""\r\n\r\nc,d\r\n')
    assert read_csv(path, ("mr", "ref")) == [{"mr": "a, b", "ref": 'one\r\ntwo "x"'}, {"mr": "c", "ref": "d"}]


def test_csv_row_with_too_few_fields_is_left_for_later(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("mr,ref\nonly\n")
    assert read_csv(path, ("mr", "ref")) == [{"mr": "only"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mr,ref\na,b\nc,d,e\n", r":3: 3 fields under a header of 2"),
        ('mr,ref\na,b\n"c"x,d\n', r":3: not valid CSV"),
        ('mr,ref\na,"b\n', r":2: not valid CSV"),
        ("MR\na\n", r":1: the header is MR; expected mr,ref"),
        ("", r":1: the header is empty"),
    ],
)
def test_csv_that_cannot_be_parsed_is_named(tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(path, ("mr", "ref"))
