"""Rows from the Hugging Face hub: Parquet files at one commit, never a loading script.

The hub converts every public data set it can to Parquet, on a branch of its own; the commit that the branch
stood at is recorded with the results, and a `HubSource` may name a commit instead of the branch. If the hub
does not answer one request within three seconds, files cached earlier are used; there is no retry.
`HF_HUB_OFFLINE` is honoured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARQUET_BRANCH = "refs/convert/parquet"
PROBE_S = 3.0


class HubUnavailable(Exception):
    """The hub, or this data set on it, is out of reach; the message says which and why."""


@dataclass(frozen=True)
class HubSource:
    """Where the hub keeps a data set.

    Attributes:
        repo: owner and name.
        columns: the hub's column name -> the official files' field name.
        revision: a commit or branch that holds Parquet files as `<config>/<split>/*.parquet`.
        config: which of the repository's configurations; `*` where it has one only.
    """

    repo: str
    columns: Mapping[str, str] = field(default_factory=dict)
    revision: str = PARQUET_BRANCH
    config: str = "*"

    def pattern(self, split: str) -> str:
        """Returns which files hold a split."""
        return f"{self.config}/{split}/*.parquet"


@dataclass(frozen=True)
class HubRows:
    """Rows under the official field names, and the commit they were read at."""

    rows: list[Any]
    revision: str


def fetch_rows(source: HubSource, split: str) -> HubRows:
    """Returns a split's rows from the hub or its local cache.

    Raises:
        HubUnavailable: if there is no answer, no cached copy, or no Parquet file of this split.
    """
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401 - untyped; only whether it is there
        from huggingface_hub import constants
    except ImportError as error:
        raise HubUnavailable(f"the hub needs the package '{error.name}'; pip install {error.name}") from error
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else probe(source)
    return _read(source, split, _snapshot(source, split, offline))


def probe(source: HubSource) -> str | None:
    """Returns why the hub cannot serve a data set now, or None if it answers; takes at most `PROBE_S`."""
    from huggingface_hub import HfApi

    try:
        within(PROBE_S, lambda: HfApi().dataset_info(source.repo, revision=source.revision, timeout=PROBE_S))
    except Exception as error:  # noqa: BLE001 - DNS, proxy, TLS, HTTP, its own: each means "no hub here"
        return f"no answer ({type(error).__name__}; HF_HUB_OFFLINE=1 skips asking)"
    return None


def within(limit_s: float, call: Callable[[], object]) -> object:
    """Returns what a call returns, or raises TimeoutError; a name look-up can outlast a client's limit."""
    result: list[object] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failure:
        raise failure[0]
    if not result:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return result[0]


def _snapshot(source: HubSource, split: str, offline: str | None) -> Path:
    """Returns the folder of the downloaded files; `offline` is the reason for looking in the cache alone.

    The branch's name is passed on, not its commit, because the cache finds a branch again without a network.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            source.repo,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=[source.pattern(split)],
            local_files_only=offline is not None,
            etag_timeout=PROBE_S,
        )
    except Exception as error:  # noqa: BLE001 - as wide a family as above
        why = f"{offline}, and it is not cached" if offline else f"download failed ({type(error).__name__})"
        raise HubUnavailable(f"{source.repo} on the hub: {why}") from error
    return Path(folder)


def _read(source: HubSource, split: str, folder: Path) -> HubRows:
    """Returns the rows of a snapshot; the snapshot folder is named after its commit."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob(source.pattern(split)))
    if not files:
        raise HubUnavailable(
            f"{source.repo} on the hub has no Parquet file of '{split}' at {source.revision}"
        )
    rows: list[Any] = []
    try:
        for path in files:
            rows.extend(pyarrow.parquet.read_table(path).to_pylist())
    except (OSError, pyarrow.ArrowException) as error:
        raise HubUnavailable(f"{source.repo} on the hub: a cached file is damaged ({error})") from error
    renamed = [{source.columns.get(name, name): value for name, value in row.items()} for row in rows]
    return HubRows(renamed, folder.name)
