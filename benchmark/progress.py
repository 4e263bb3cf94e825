"""A progress bar with each technique's live tokens/s; silent where stderr is no terminal or NO_COLOR is set."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import TracebackType

from tqdm import tqdm  # type: ignore[import-untyped]  # ships no type information
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]  # as above

from benchmark import metrics
from benchmark.plan import Turn
from benchmark.records import Record
from benchmark.table import is_terminal


class Progress:
    """Counts turns on stderr.

    Args:
        total: turns to come.
        title: what is being done.
    """

    def __init__(self, total: int, title: str) -> None:
        shown = total > 0 and is_terminal(sys.stderr)
        self._bar = tqdm(total=total, desc=title, unit="answer", disable=not shown)
        self._redirect = logging_redirect_tqdm() if shown else nullcontext()
        self._tokens: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        self._redirect.__enter__()  # log lines go above the bar
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._redirect.__exit__(kind, error, trace)
        self._bar.close()

    def show(self, turn: Turn, records: Sequence[Record]) -> None:
        """Adds a turn's answers to its technique's speed."""
        name = turn.cell.model_type
        for one in metrics.totals(records).values():
            self._tokens[name] = self._tokens.get(name, 0) + one.output_tokens
            self._seconds[name] = self._seconds.get(name, 0.0) + one.total_s
        speeds = {key: self._tokens[key] / spent for key, spent in self._seconds.items() if spent}
        self._bar.set_postfix_str(
            ", ".join(f"{key} {speed:.0f} tok/s" for key, speed in speeds.items()), refresh=False
        )

    def advance(self) -> None:
        """Counts one turn as past."""
        self._bar.update()
