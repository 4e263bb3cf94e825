import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datasets_code.sql_sandbox import (
    Execution,
    Limits,
    Outcome,
    SqlSandbox,
    execution_score,
    has_order,
    judge_all,
    resolve_database,
)

GOLD = "SELECT name FROM city"
TIMEOUT_S = 0.5


def make_database(root: Path, name: str, statements: str) -> Path:
    path = root / name / f"{name}.sqlite"
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.executescript(statements)
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("database")
    rows = ", ".join(f"({number}, 'city {number}', {number * 10})" for number in range(60))
    make_database(
        folder, "towns", f"CREATE TABLE city (id INT, name TEXT, size INT); INSERT INTO city VALUES {rows};"
    )
    make_database(folder, "empty", "CREATE TABLE city (id INT, name TEXT);")
    make_database(
        folder,
        "odd",
        "CREATE TABLE city (id INT, name TEXT); INSERT INTO city VALUES (1, CAST(x'ff41' AS TEXT));",
    )
    (folder / "broken").mkdir()
    (folder / "broken" / "broken.sqlite").write_bytes(b"SQLite format 3\0" + b"\xff" * 4000)
    (folder / "bytes").mkdir()
    (folder / "bytes" / "bytes.sqlite").write_bytes(b"no database at all" * 100)
    return folder


@pytest.fixture(scope="module")
def sandbox(root):
    with SqlSandbox(Limits(query_s=TIMEOUT_S)) as running:
        yield running


def judge(sandbox, root, prediction, gold=GOLD, name="towns") -> Outcome:
    return sandbox.judge(Execution(str(root), name, gold, prediction))


def listing(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [
        (GOLD, "select  NAME from City ;", "correct"),
        (GOLD, "SELECT name FROM city ORDER BY id DESC", "correct"),
        (GOLD + " ORDER BY id", "SELECT name FROM city ORDER BY id DESC", "wrong"),
        ("SELECT id, name FROM city", "SELECT name, id FROM city", "correct"),
        ("SELECT count(*) FROM city", "SELECT 60.0", "correct"),
        ("SELECT count(*) FROM city", "SELECT '60'", "wrong"),
        (GOLD, "SELECT upper(name) FROM city", "wrong"),
        ("SELECT name FROM city WHERE id = -1", "SELECT id, name FROM city WHERE id = -2", "correct"),
        (GOLD, "SELECT DISTINCT name FROM city", "correct"),
        (GOLD, "WITH RECURSIVE n(x) AS (SELECT 0 UNION ALL SELECT x + 1 FROM n LIMIT 60) "
         "SELECT 'city ' || x FROM n", "correct"),
        ("SELECT NULL", "SELECT NULL", "correct"),
        ("SELECT 1 - 0.9", "SELECT 0.1", "wrong"),
    ],
)  # fmt: skip
def test_verdicts(sandbox, root, gold, prediction, verdict):
    assert judge(sandbox, root, prediction, gold).verdict == verdict


HOSTILE = [
    "DROP TABLE city",
    "DELETE FROM city",
    "UPDATE city SET name = 'x'",
    "INSERT INTO city VALUES (1, 'x', 1)",
    "CREATE TABLE pwned (x)",
    "CREATE TEMP TABLE pwned (x)",
    "ALTER TABLE city RENAME TO town",
    "ATTACH DATABASE 'pwned.db' AS pwned",
    "ATTACH DATABASE ':memory:' AS pwned",
    "DETACH DATABASE main",
    "PRAGMA query_only=OFF",
    "PRAGMA writable_schema=ON",
    "SELECT * FROM pragma_database_list",
    "VACUUM",
    "VACUUM INTO 'pwned.db'",
    "REINDEX",
    "BEGIN EXCLUSIVE",
    "SELECT load_extension('pwned.so')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('pwned.txt', 'x')",
    "SELECT randomblob(1000000000)",
    "SELECT length(zeroblob(1000000000))",
    "WITH x AS (SELECT 1) DELETE FROM city",
    "EXPLAIN DELETE FROM city",
]


@pytest.mark.parametrize("prediction", HOSTILE)
def test_writing_and_reaching_out_are_denied(sandbox, root, prediction):
    before = listing(root)
    assert judge(sandbox, root, prediction).verdict == "error"
    assert listing(root) == before
    assert not Path("pwned.db").exists() and not Path("/pwned.db").exists()
    assert judge(sandbox, root, GOLD).verdict == "correct"


@pytest.mark.parametrize(
    "prediction",
    [
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n",
        "SELECT sum(a.size * b.size) FROM city a, city b, city c, city d, city e",
        "SELECT max(length(printf('%.*c', 9000000, 'x') || a.id)) FROM city a, city b, city c",
    ],
)
def test_endless_queries_are_stopped_in_time(sandbox, root, prediction):
    judge(sandbox, root, GOLD)  # starts the child
    start = time.monotonic()
    outcome = judge(sandbox, root, prediction)
    assert time.monotonic() - start < TIMEOUT_S + 0.5
    assert outcome.verdict == "timeout"
    assert judge(sandbox, root, GOLD).verdict == "correct"


def test_child_that_stops_a_query_itself_is_kept(sandbox, root):
    judge(sandbox, root, GOLD)
    process = sandbox._process
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"
    assert judge(sandbox, root, endless) == Outcome("timeout", "OperationalError: interrupted")
    assert sandbox._process is process


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_child_has_limits_and_no_secrets(root, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with SqlSandbox() as sandbox:
        judge(sandbox, root, GOLD)
        folder = Path("/proc") / str(sandbox._process.pid)
        limits = {
            line[:25].strip(): line[25:].split()[0] for line in (folder / "limits").read_text().splitlines()
        }
        assert b"secret" not in (folder / "environ").read_bytes()
    assert limits["Max address space"] == str(1 << 30)
    assert limits["Max file size"] == limits["Max core file size"] == "0"
    assert limits["Max cpu time"] != "unlimited"


def test_printf_bomb_is_stopped_in_time(sandbox, root):
    judge(sandbox, root, GOLD)
    start = time.monotonic()
    assert judge(sandbox, root, "SELECT printf('%.*c', 2000000000, 'x')").verdict in ("timeout", "error")
    assert time.monotonic() - start < TIMEOUT_S + 0.5


def test_child_that_never_answers_is_killed(root, monkeypatch, tmp_path):
    deaf = tmp_path / "deaf.py"
    deaf.write_text("import time\nprint('{}', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr("datasets_code.sql_sandbox.CHILD", deaf)
    with SqlSandbox(Limits(gold_s=0.2, grace_s=0.1)) as sandbox:
        start = time.monotonic()
        outcome = judge(sandbox, root, GOLD)
        assert time.monotonic() - start < 5
    assert outcome.verdict == "gold_error" and "killed" in outcome.reason


def test_child_that_dies_is_an_error_and_replaced(sandbox, root):
    judge(sandbox, root, GOLD)
    process = sandbox._process
    process.kill()
    process.wait()
    assert judge(sandbox, root, GOLD).verdict == "gold_error"
    assert judge(sandbox, root, GOLD).verdict == "correct"


def test_rows_without_end_are_an_error(sandbox, root):
    prediction = "SELECT 1 FROM city a, city b, city c"
    assert "more than 50000 rows" in judge(sandbox, root, prediction).reason


def test_memory_bomb_is_an_error_or_timeout(root):
    many = "SELECT printf('%.*c', 9000000, 'x') FROM city a, city b"
    with SqlSandbox(Limits(query_s=10.0)) as sandbox:
        assert judge(sandbox, root, many).verdict in ("error", "timeout")
        assert judge(sandbox, root, GOLD).verdict == "correct"


@pytest.mark.parametrize(
    "prediction",
    [
        "",
        "   \n",
        ";",
        "-- nothing",
        "/* nothing */",
        "SELEC name FROM city",
        "SELECT nope FROM city",
        "SELECT name FROM nowhere",
        "SELECT name FROM city; SELECT 1",
        "SELECT 1; DROP TABLE city",
        "SELECT \0 1",
        "SELECT '\ud800'",
        "SELECT " + "(" * 300 + "1" + ")" * 300,
        "SELECT " + "1," * 1000 + "1",
        "SELECT '" + "x" * 200_000 + "'",
        "SELECT 1" + " UNION SELECT 1" * 10_000,
        "x" * 2_000_000,
        "SELECT abs(-9223372036854775808)",
        "SELECT ?",
        "SELECT :name",
    ],
)
def test_texts_that_are_no_query_are_wrong_and_no_crash(sandbox, root, prediction):
    assert judge(sandbox, root, prediction).verdict == "error"


def test_invalid_utf8_in_a_database_is_read(sandbox, root):
    assert judge(sandbox, root, "SELECT name FROM city", name="odd").verdict == "correct"


def test_database_without_rows_is_left_out(sandbox, root):
    assert judge(sandbox, root, GOLD, name="empty").verdict == "no_rows"


@pytest.mark.parametrize(
    "name", ["nowhere", "../database/towns", "..", "", "broken", "bytes", "towns\0", "a/b"]
)
def test_unusable_database_is_a_gold_error_and_never_created(sandbox, root, name):
    before = listing(root)
    assert judge(sandbox, root, GOLD, name=name).verdict == "gold_error"
    assert listing(root) == before


def test_link_out_of_the_root_is_refused(tmp_path, root):
    (tmp_path / "inner" / "towns").mkdir(parents=True)
    os.symlink(root / "towns" / "towns.sqlite", tmp_path / "inner" / "towns" / "towns.sqlite")
    with pytest.raises(ValueError, match="a link leads out"):
        resolve_database(tmp_path / "inner", "towns")


def test_paths_with_odd_characters_work(tmp_path):
    folder = tmp_path / "with space ?&#%41 é"
    make_database(folder, "towns", "CREATE TABLE city (name TEXT); INSERT INTO city VALUES ('x');")
    assert judge_all([Execution(str(folder), "towns", GOLD, GOLD)]) == [Outcome("correct")]


def test_failing_gold_query_is_a_gold_error(sandbox, root):
    outcome = judge(sandbox, root, GOLD, gold="SELECT nope FROM city")
    assert outcome.verdict == "gold_error" and "no such column" in outcome.reason


def test_many_are_judged_in_order_by_several_workers(root):
    predictions = [GOLD if number % 3 else "SELECT 1" for number in range(20)]
    outcomes = judge_all([Execution(str(root), "towns", GOLD, text) for text in predictions], workers=3)
    assert [outcome.verdict for outcome in outcomes] == ["correct" if n % 3 else "wrong" for n in range(20)]
    assert judge_all([]) == []


def test_score_counts_apart():
    verdicts = ["correct", "correct", "wrong", "error", "timeout", "gold_error", "no_rows", "no_rows"]
    score = execution_score([Outcome(verdict, f"why {verdict}") for verdict in verdicts])
    assert score.values == {
        "exec_accuracy": 2 / 5,
        "exec_error_rate": 1 / 5,
        "exec_timeout_rate": 1 / 5,
        "gold_error_count": 1,
        "n_executed": 5,
        "n_no_rows_excluded": 2,
    }
    assert score.notes == {"gold_error_count": "why gold_error"}


def test_score_without_any_database_gives_the_reason():
    score = execution_score([Outcome("gold_error", "database x: no file y")])
    assert "exec_accuracy" not in score.values
    assert score.unavailable["exec_accuracy"] == "no gold query ran: database x: no file y"


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM b ORDER BY a", True),
        ("select a from b order\n by a limit 1", True),
        ("SELECT a FROM b WHERE c = 'order by'", False),
        ("SELECT order_by FROM b", False),
    ],
)
def test_order_is_seen(query, ordered):
    assert has_order(query) is ordered


def test_child_imports_little():
    child = Path(__file__).resolve().parents[2] / "datasets_code" / "sql_sandbox_child.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "importtime", str(child)],
        input=b"",
        capture_output=True,
        check=True,
    )
    assert done.stdout == b'{"status": "ready"}\n'
    assert b"numpy" not in done.stderr and b"datasets_code" not in done.stderr


def test_no_child_outlives_its_sandbox(root):
    with SqlSandbox() as sandbox:
        judge(sandbox, root, GOLD)
        process = sandbox._process
    assert process.returncode is not None
    sandbox.close()
