import json
import resource
import subprocess
import sys

import pytest

from benchmark.files import Appender, read_json, read_lines, write_atomically, write_csv, write_json


def test_appended_lines_come_back(tmp_path):
    file = Appender(tmp_path / "a.jsonl")
    file.append([{"text": "\ud83d half a pair, \u0000, é"}, {"b": 1}])
    file.close()
    file.append([{"c": 2}])
    file.close()
    assert list(read_lines(tmp_path / "a.jsonl", list)) == [["text"], ["b"], ["c"]]
    (tmp_path / "a.jsonl").read_bytes().decode("utf-8")


@pytest.mark.parametrize("tail", [b'{"b": ', b'{"b": 2}', b"\xff\xfe\n", b"[1]\n"])
def test_a_torn_last_line_is_left_out(tmp_path, tail):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert list(read_lines(path, dict)) == [{"a": 1}]


@pytest.mark.parametrize("line", [b"x\n", b"[1]\n", b"\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_broken_line_that_is_not_the_last_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'{"a": 2}\n')
    with pytest.raises(ValueError, match=rf"^line 2 of {path} cannot be parsed$"):
        list(read_lines(path, dict))


def test_a_line_of_another_kind_is_named_wherever_it_stands(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 1}\n')
    with pytest.raises(ValueError, match=rf"^line 2 of {path} is not what this file holds \('a'\)$"):
        list(read_lines(path, lambda values: values["a"]))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"new": float("nan")})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert read_json(path) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "summary.json", {"old": 1})
    code = (
        "import resource, sys; from pathlib import Path; from benchmark.files import write_atomically\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))\n"
        "try: write_atomically(Path(sys.argv[1]), 'x' * 5000)\n"
        "except OSError: sys.exit(7)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "summary.json")], check=False)
    assert done.returncode == 7
    assert read_json(tmp_path / "summary.json") == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_csv_holds_nested_values_as_json(tmp_path):
    write_csv(tmp_path / "s.csv", [{"a": 1, "b": {"x": [1]}}, {"a": None, "b": (1, 2)}])
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "a,b"
    assert json.loads(lines[1].split(",", 1)[1].strip('"').replace('""', '"')) == {"x": [1]}
