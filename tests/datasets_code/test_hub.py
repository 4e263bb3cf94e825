import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import pytest

from datasets_code import hub
from datasets_code.hub import HubSource, HubUnavailable, fetch_rows, within

SOURCE = HubSource("someone/things", {"label": "name"})


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A hub that answers; `calls` holds what was asked of it."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "abc123"
    for split in ("train", "test"):
        (folder / "default" / split).mkdir(parents=True)
    table = pyarrow.table({"label": ["a", None], "size": [1, 2]})
    parquet.write_table(table, folder / "default" / "test" / "0000.parquet")
    parquet.write_table(table.slice(0, 1), folder / "default" / "test" / "0001.parquet")
    state = SimpleNamespace(probes=0, snapshots=[], fail_probe=None, fail_snapshot=None, folder=folder)

    class Api:
        def dataset_info(self, repo, revision, timeout):
            state.probes += 1
            assert (repo, revision, timeout) == ("someone/things", "refs/convert/parquet", hub.PROBE_S)
            if state.fail_probe:
                raise state.fail_probe

    def snapshot_download(repo, **options):
        state.snapshots.append(options)
        if state.fail_snapshot:
            raise state.fail_snapshot
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return state


def test_rows_are_renamed_and_the_commit_is_told(fake_hub):
    fetched = fetch_rows(SOURCE, "test")
    assert fetched.rows == [{"name": "a", "size": 1}, {"name": None, "size": 2}, {"name": "a", "size": 1}]
    assert fetched.revision == "abc123"
    assert fake_hub.snapshots[0]["allow_patterns"] == ["*/test/*.parquet"]
    assert fake_hub.snapshots[0]["local_files_only"] is False


def test_offline_asks_nobody_and_reads_the_cache(fake_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(fetch_rows(SOURCE, "test").rows) == 3
    assert fake_hub.probes == 0
    assert fake_hub.snapshots[0]["local_files_only"] is True
    fake_hub.fail_snapshot = FileNotFoundError()
    with pytest.raises(
        HubUnavailable, match="someone/things on the hub: HF_HUB_OFFLINE is set, and it is not cached"
    ):
        fetch_rows(SOURCE, "test")


def test_failed_probe_is_not_retried_and_reads_the_cache(fake_hub):
    fake_hub.fail_probe = ConnectionError()
    assert len(fetch_rows(SOURCE, "test").rows) == 3
    assert fake_hub.probes == 1
    assert fake_hub.snapshots[0]["local_files_only"] is True
    fake_hub.fail_snapshot = FileNotFoundError()
    with pytest.raises(HubUnavailable, match=r"no answer \(ConnectionError; HF_HUB_OFFLINE=1 skips asking\)"):
        fetch_rows(SOURCE, "test")


def test_failed_download_and_missing_split_are_told(fake_hub):
    with pytest.raises(HubUnavailable, match="no Parquet file of 'train' at refs/convert/parquet"):
        fetch_rows(SOURCE, "train")
    (fake_hub.folder / "default" / "train" / "0000.parquet").write_bytes(b"torn")
    with pytest.raises(HubUnavailable, match="a cached file is damaged"):
        fetch_rows(SOURCE, "train")
    fake_hub.fail_snapshot = OSError()
    with pytest.raises(HubUnavailable, match=r"download failed \(OSError\)"):
        fetch_rows(SOURCE, "test")


def test_slow_call_is_given_up():
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        within(0.1, lambda: time.sleep(2))
    assert time.monotonic() - start < 1


def test_call_within_its_limit_gives_its_result_or_its_error():
    assert within(5, lambda: None) is None
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])


def test_one_configuration_of_a_repository(fake_hub):
    (fake_hub.folder / "other" / "test").mkdir(parents=True)
    shutil.copy(
        fake_hub.folder / "default" / "test" / "0000.parquet",
        fake_hub.folder / "other" / "test" / "0000.parquet",
    )
    assert len(fetch_rows(HubSource("someone/things", config="other"), "test").rows) == 2
    assert fake_hub.snapshots[0]["allow_patterns"] == ["other/test/*.parquet"]
