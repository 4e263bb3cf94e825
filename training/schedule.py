"""How far a run is: by steps, or by a wall clock that ends the cosine and the run together."""

# ruff: noqa: ARG002 - callbacks keep upstream's signature

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

CHECK_EVERY = 10


class CosineSchedule:
    """Factor of the learning rate: linear warm-up, then a cosine to zero at the end of training.

    A checkpoint of the scheduler holds what the clock said (the instance's `__dict__`, plain numbers) but not the three limits,
    which are slots: a resumed run obeys the limits of its own flags.

    Args:
        warmup_steps: steps of linear warm-up.
        total_steps: steps of the run, where steps end it.
        limit_s: seconds of training, held-out checks inside, where the clock ends it; None for none.
    """

    __slots__ = ("__dict__", "limit_s", "total_steps", "warmup_steps")

    def __init__(self, warmup_steps: int, total_steps: int, limit_s: float | None = None):
        self.warmup_steps, self.total_steps, self.limit_s = warmup_steps, total_steps, limit_s
        self.elapsed_s = 0.0
        self.seen_step = 0
        self.s_per_step = 0.0

    def observe(self, step: int, elapsed_s: float) -> None:
        """Takes the clock's reading after a step."""
        if step > self.seen_step:
            self.s_per_step = (elapsed_s - self.elapsed_s) / (step - self.seen_step)
        self.seen_step, self.elapsed_s = step, elapsed_s

    def fraction(self, step: int) -> float:
        """Returns the part of the run that is done after `step` steps, 0 to 1; between readings the last pace is assumed."""
        done = step / max(self.total_steps, 1)
        if self.limit_s is not None:
            done = max(done, (self.elapsed_s + (step - self.seen_step) * self.s_per_step) / self.limit_s)
        return min(max(done, 0.0), 1.0)

    def __call__(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * 0.5 * (1.0 + math.cos(math.pi * self.fraction(step)))


class TimeLimit(TrainerCallback):
    """Reads the clock every few steps and ends the run with the schedule; time of earlier, resumed parts counts.

    Args:
        agree: turns this process's reading into the one that all processes use.
        clock: seconds that never go back.
        saves: whether the run ends with a checkpoint.
    """

    def __init__(
        self, agree: Callable[[float], float], clock: Callable[[], float] = time.monotonic, saves: bool = True
    ):
        self.agree, self.clock, self.saves = agree, clock, saves
        self.begin = 0.0
        self.schedule: CosineSchedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock where the restored schedule stopped."""
        self.schedule = kwargs["lr_scheduler"].lr_lambdas[0]
        self.begin = self.clock() - self.schedule.elapsed_s

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Updates the schedule and, at its end, stops the run, with a last checkpoint if it keeps any."""
        assert self.schedule is not None
        if state.global_step % CHECK_EVERY:
            return
        self.schedule.observe(state.global_step, self.agree(self.clock() - self.begin))
        if self.schedule.fraction(state.global_step) >= 1.0:
            control.should_training_stop = True
            control.should_save = self.saves
            control.should_log = True
