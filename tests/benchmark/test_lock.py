import json
import os
import subprocess
import sys

import pytest

from benchmark.errors import UsageError
from benchmark.lock import RunLock

HOLD = (
    "import sys, time; from pathlib import Path; from benchmark.lock import RunLock\n"
    "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_told_who_holds_the_directory(tmp_path, holder):
    with pytest.raises(UsageError) as caught, RunLock(tmp_path):
        pass
    assert f"process {holder.pid} on {os.uname().nodename}" in str(caught.value)


def test_the_lock_of_a_killed_run_is_stale(tmp_path, holder, caplog):
    holder.kill()
    holder.wait()
    assert (tmp_path / "LOCK").exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "LOCK").read_text())["pid"] == os.getpid()
    assert f"left by process {holder.pid}" in caplog.text
    assert not (tmp_path / "LOCK").exists()


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), RunLock(tmp_path):
        raise RuntimeError
    with RunLock(tmp_path):
        pass
