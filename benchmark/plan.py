"""What is measured, in which order. `schedule` is all of resume: it leaves out what is done.

Within a group the techniques answer each prompt in turn, A B C A B C, so that clocks and heat hit all of them alike.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A technique that takes part in a run.

    Args:
        name: as given to `--model_type`.
        recipe: what its worker makes real, plain JSON.
        twin: contender with the same recipe and no drafts, against which exactness is judged.
        largest_batch: most prompts it answers at once; None for no limit.
    """

    name: str
    recipe: Mapping[str, Any]
    twin: str | None = None
    largest_batch: int | None = None

    @property
    def sweeps(self) -> bool:
        """Whether our engine drafts for it, so that its acceptance can be set."""
        return self.recipe.get("decoder") == "engine" and bool(self.recipe.get("drafts"))

    def refusal(self, batch_size: int) -> str | None:
        """Returns why it cannot answer so many prompts at once, None if it can."""
        if self.largest_batch is None or batch_size <= self.largest_batch:
            return None
        return f"{self.name} runs at batch size {self.largest_batch} at most"


@dataclass(frozen=True)
class Cell:
    """One technique on one data set at one batch size, within one group."""

    model_type: str
    dataset: str
    batch_size: int
    group: int


@dataclass(frozen=True)
class Turn:
    """One request: a cell's worker answers these prompts. `acceptance_ratio` is set in the acceptance sweep only."""

    cell: Cell
    repeat: int
    index: int
    prompt_ids: tuple[str, ...]
    acceptance_ratio: float | None = None

    @property
    def request(self) -> str:
        """The request's id, the same in every resumed run."""
        cell = self.cell
        swept = "" if self.acceptance_ratio is None else f"a{self.acceptance_ratio}/"
        return f"{cell.model_type}/{cell.dataset}/b{cell.batch_size}/g{cell.group}/r{self.repeat}/{swept}{self.index}"


@dataclass(frozen=True)
class RunPlan:
    """Everything a run will do.

    Args:
        groups: names of the techniques whose workers live side by side; the baseline leads each group.
        prompt_ids: data set -> ids of its prompts, in order.
        batch_sizes: prompts answered at once.
        repeats: times each prompt is answered.
        contenders: name -> technique, the baseline first.
        seed: seed of sampling and of the bootstrap.
        greedy: tokens are not drawn at random, so that equal ones can be expected.
    """

    groups: tuple[tuple[str, ...], ...]
    prompt_ids: Mapping[str, tuple[str, ...]]
    batch_sizes: tuple[int, ...]
    repeats: int
    contenders: Mapping[str, Contender]
    seed: int = 0
    greedy: bool = True

    @property
    def baseline(self) -> str:
        """The technique every ratio is taken against."""
        return self.groups[0][0]

    def cells(self) -> Iterator[Cell]:
        """Yields the cells in the order of the printed table: data set, batch size, technique."""
        for dataset in self.prompt_ids:
            for batch_size in self.batch_sizes:
                for group, names in enumerate(self.groups):
                    for name in names:
                        yield Cell(name, dataset, batch_size, group)


def batches(prompt_ids: Sequence[str], batch_size: int) -> list[tuple[str, ...]]:
    """Returns the prompts cut into requests; the last one may be shorter."""
    return [tuple(prompt_ids[start : start + batch_size]) for start in range(0, len(prompt_ids), batch_size)]


def schedule(plan: RunPlan, done: Collection[str]) -> Iterator[Turn]:
    """Yields the requests that are not done yet, group by group, techniques interleaved prompt by prompt.

    Args:
        plan: the run.
        done: ids of requests whose answers are on disk.
    """
    for group, names in enumerate(plan.groups):
        for dataset, prompt_ids in plan.prompt_ids.items():
            for batch_size in plan.batch_sizes:
                for repeat in range(plan.repeats):
                    for index, prompts in enumerate(batches(prompt_ids, batch_size)):
                        for name in names:
                            if plan.contenders[name].refusal(batch_size):
                                continue
                            turn = Turn(Cell(name, dataset, batch_size, group), repeat, index, prompts)
                            if turn.request not in done:
                                yield turn


def single_pass(
    plan: RunPlan, names: Collection[str], done: Collection[str], ratio: float | None = None
) -> Iterator[Turn]:
    """Yields one pass over all prompts for some techniques, as the breakdown and the acceptance sweep need it."""
    seen: set[tuple[object, ...]] = set()
    for turn in schedule(replace(plan, repeats=1), ()):
        once = replace(turn, acceptance_ratio=ratio)
        key = (turn.cell.model_type, turn.cell.dataset, turn.cell.batch_size, turn.index)
        if turn.cell.model_type in names and key not in seen:
            seen.add(key)
            if once.request not in done:
                yield once


def make_groups(
    baseline: str, others: Sequence[str], bytes_each: Mapping[str, int], budget: int
) -> tuple[tuple[str, ...], ...]:
    """Returns groups of techniques whose workers fit the memory together, the baseline in each of them.

    Args:
        baseline: leads every group, so that each ratio compares runs made side by side.
        others: the other techniques, in order.
        bytes_each: estimated memory of each worker.
        budget: memory that all workers of a group may take.
    """
    groups: list[list[str]] = [[baseline]]
    for name in others:
        taken = sum(bytes_each[member] for member in groups[-1])
        if len(groups[-1]) > 1 and taken + bytes_each[name] > budget:
            groups.append([baseline])
        groups[-1].append(name)
    return tuple(tuple(group) for group in groups)
