"""Carries out a plan: asks the workers turn by turn and appends each answer to the records as it comes.

The headline run times nothing inside a step. The breakdown and the acceptance sweep follow in passes of their own, each
with its own file, each resumable like the headline.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from benchmark.answers import Examples, failed_records, limits, records_of
from benchmark.config import RunConfig
from benchmark.crew import Crew
from benchmark.errors import RunError
from benchmark.files import Appender
from benchmark.plan import Cell, RunPlan, Turn, schedule, single_pass
from benchmark.progress import Progress
from benchmark.records import ERROR, SETTLED, Record, done_requests
from benchmark.run_directory import RunDirectory
from benchmark.worker_client import WorkerError

logger = logging.getLogger(__name__)


class Measurement:
    """One run being measured.

    Args:
        config: its options.
        plan: what to measure.
        examples: data set -> prompt id -> example.
        crew: the workers.
        directory: where the results go.
        alone: the technique the user named alone, which must load.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: RunPlan,
        examples: Examples,
        crew: Crew,
        directory: RunDirectory,
        alone: str | None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.examples = examples
        self.crew = crew
        self.directory = directory
        self.must_load = {plan.baseline, alone}
        self._warm: set[tuple[str, int, str, int]] = set()

    def headline(self) -> None:
        """Measures all that is not on disk yet."""
        done = done_requests(self.directory.repair("records"))
        turns = list(schedule(self.plan, done))
        with Progress(len(turns), "measuring") as progress:
            for group in range(len(self.plan.groups)):
                self._pass("records", [turn for turn in turns if turn.cell.group == group], progress)

    def breakdown(self) -> None:
        """Runs every technique once more with the phases of a step timed."""
        done = done_requests(self.directory.repair("breakdown"))
        turns = list(single_pass(self.plan, list(self.plan.contenders), done))
        self._single("breakdown", turns, "breakdown", record_phases=True)

    def sweep(self) -> None:
        """Runs the drafting techniques with trees that hold the right token with a given probability."""
        done = done_requests(self.directory.repair("sweep"))
        names = [name for name, contender in self.plan.contenders.items() if contender.sweeps]
        turns = [
            turn
            for ratio in self.config.acceptance_sweep
            for turn in single_pass(self.plan, names, done, ratio)
        ]
        self._single("sweep", turns, "acceptance sweep")

    def _single(self, kind: str, turns: Sequence[Turn], title: str, **how: Any) -> None:
        lost = {self._place(record) for record in self.directory.records() if record.status not in SETTLED}
        usable = [turn for turn in turns if self._place(turn.cell) not in lost]
        with Progress(len(usable), title) as progress:
            for group in range(len(self.plan.groups)):
                self._pass(kind, [turn for turn in usable if turn.cell.group == group], progress, **how)

    @staticmethod
    def _place(item: Cell | Record) -> tuple[str, str, int]:
        return item.model_type, item.dataset, item.batch_size

    def _pass(self, kind: str, turns: Sequence[Turn], progress: Progress, **how: Any) -> None:
        """Takes the turns of one group; a cell that fails loses its remaining turns."""
        if not turns:
            return
        self.crew.assemble(turn.cell.model_type for turn in turns)
        self.directory.save_loaded(self.crew.loaded)
        failed: set[tuple[Cell, float | None]] = set()
        with closing(Appender(self.directory.file(f"{kind}.jsonl"))) as file:
            for turn in turns:
                if (turn.cell, turn.acceptance_ratio) not in failed:
                    records = self._turn(turn, **how)
                    file.append([record.as_json() for record in records])
                    if any(record.status not in SETTLED for record in records):
                        failed.add((turn.cell, turn.acceptance_ratio))
                    progress.show(turn, records)
                progress.advance()

    def _turn(self, turn: Turn, **how: Any) -> list[Record]:
        try:
            self._warm_up(turn, **how)
            answer = self._generate(turn, **how)
        except WorkerError as error:
            return self._failed(turn, error)
        return list(records_of(turn, answer))

    def _warm_up(self, turn: Turn, **how: Any) -> None:
        """Lets a technique answer before it is timed, once for each data set and batch size its worker meets."""
        cell = turn.cell
        key = (cell.model_type, self.crew.ensure(cell.model_type), cell.dataset, cell.batch_size)
        if key in self._warm:
            return
        with closing(Appender(self.directory.file("warmup.jsonl"))) as file:
            for _ in range(self.config.warmup):
                file.append([record.as_json() for record in records_of(turn, self._generate(turn, **how))])
        self._warm.add(key)

    def _generate(self, turn: Turn, **how: Any) -> dict[str, Any]:
        if turn.acceptance_ratio is not None:
            how["acceptance_ratio"] = turn.acceptance_ratio
        examples = [self.examples[turn.cell.dataset][prompt_id] for prompt_id in turn.prompt_ids]
        return self.crew.ask(
            turn.cell.model_type,
            "generate",
            self.config.timeout_s,
            prompts=[example.prompt.text for example in examples],
            limits=limits(self.config, turn.index),
            prompt_tokens=examples[0].context.get("prompt_tokens"),
            **how,
        )

    def _failed(self, turn: Turn, error: WorkerError) -> list[Record]:
        name = turn.cell.model_type
        if name in self.crew.refused and name in self.must_load and error.status == ERROR:
            raise RunError(f"{name} cannot be loaded: {error}") from None
        logger.warning("%s on %s, batch %d: %s", name, turn.cell.dataset, turn.cell.batch_size, error)
        return failed_records(turn, error.status, str(error))
