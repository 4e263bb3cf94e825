from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from training.schedule import CHECK_EVERY, CosineSchedule, TimeLimit


def test_steps_end_the_cosine():
    schedule = CosineSchedule(10, 100)
    assert schedule(0) == pytest.approx(0.1)
    assert schedule(50) == pytest.approx(0.5)
    assert schedule(100) == pytest.approx(0.0)
    assert all(schedule(step) > schedule(step + 1) for step in range(10, 99))


def test_the_clock_ends_the_cosine_at_the_measured_pace():
    schedule = CosineSchedule(0, 10**6, limit_s=100.0)
    schedule.observe(10, 20.0)
    assert schedule.fraction(10) == pytest.approx(0.2)
    assert schedule.fraction(15) == pytest.approx(0.3)
    schedule.observe(20, 100.0)
    assert schedule(20) == pytest.approx(0.0)


def run_clock(schedule: CosineSchedule, seconds_a_step: float, first_step: int = 0) -> int:
    now = [1000.0]
    limit = TimeLimit(agree=lambda seconds: seconds, clock=lambda: now[0])
    control = SimpleNamespace(should_training_stop=False, should_save=False, should_log=False)
    limit.on_train_begin(None, None, control, lr_scheduler=SimpleNamespace(lr_lambdas=[schedule]))
    for step in range(first_step + 1, 10_000):
        now[0] += seconds_a_step
        limit.on_step_end(None, SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            assert control.should_save
            return step
    raise AssertionError("never stopped")


def test_the_run_stops_when_its_time_is_up():
    stopped = run_clock(CosineSchedule(0, 10**6, limit_s=60.0), 0.5)
    assert 120 <= stopped < 120 + CHECK_EVERY


def test_time_before_a_resume_counts_and_limits_are_the_new_runs():
    old = CosineSchedule(0, 10**6, limit_s=60.0)
    old.observe(80, 40.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    saved = torch.optim.lr_scheduler.LambdaLR(optimizer, old).state_dict()
    resumed = torch.optim.lr_scheduler.LambdaLR(optimizer, CosineSchedule(0, 10**6, limit_s=90.0))
    resumed.load_state_dict(saved)
    schedule = resumed.lr_lambdas[0]
    assert (schedule.elapsed_s, schedule.limit_s) == (40.0, 90.0)
    assert 180 <= run_clock(schedule, 0.5, first_step=80) < 180 + CHECK_EVERY
