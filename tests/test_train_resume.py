"""What may differ where a run goes on, and how many steps it then has."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from spu.train.config import TrainConfig
from spu.train.job import Job
from spu.train.resume import resume_config
from spu.train.run_folder import RunFolder


def test_resuming_may_move_the_run_but_not_change_it(tmp_path):
    saved = TrainConfig(steps=3, lr=0.1, data=str(tmp_path / "a.txt"))
    moved = resume_config(saved, {"devices": "cpu", "budget": "cpu=1GB", "lr": 0.1})
    assert moved == dataclasses.replace(saved, devices="cpu", budget="cpu=1GB")
    assert resume_config(saved, {"data": str(tmp_path / "." / "a.txt")}) == saved
    with pytest.raises(ValueError, match=r"--lr 0.2 differs from the run's 0.1: leave it out"):
        resume_config(saved, {"lr": 0.2})
    with pytest.raises(ValueError, match="--model m differs from the run's default"):
        resume_config(saved, {"model": "m"})


def test_what_is_watched_and_kept_may_change():
    saved = TrainConfig(steps=3, save_every=7)
    given = {"save_every": 2, "keep": 3, "export": "best", "eval_every": 1, "patience": 4, "max_loss": 9.0}
    assert resume_config(saved, given) == dataclasses.replace(saved, **given)
    with pytest.raises(ValueError, match="--eval-batches 5 differs from the run's 2"):
        resume_config(saved, {"eval_batches": 5})


@pytest.mark.parametrize(("epochs", "steps", "lengthened"), [(3.0, 30, False), (3.5, 35, True)])
def test_epochs_become_steps_once_the_text_is_read(epochs, steps, lengthened):
    config = resume_config(TrainConfig(steps=30), {"epochs": epochs})
    job = Job(config, None, new=False, saved_steps=30)
    job.corpus = SimpleNamespace(steps_per_epoch=lambda batch, seq: 10)
    job._settle_epochs()
    assert (job.config.steps, job.config.epochs, job.lengthened) == (steps, None, lengthened)


def test_fewer_epochs_than_the_run_has_are_refused():
    job = Job(resume_config(TrainConfig(steps=30), {"epochs": 2.0}), None, new=False, saved_steps=30)
    job.corpus = SimpleNamespace(steps_per_epoch=lambda batch, seq: 10)
    with pytest.raises(ValueError, match="--epochs 2: the run has 30 steps, which can be raised but not lowered"):
        job._settle_epochs()


def test_a_run_of_an_earlier_spu_is_planned_again_and_a_damaged_plan_is_not(tmp_path):
    """Its plan was refused, and with it the run."""
    said = []
    job = Job(TrainConfig(), RunFolder(tmp_path), new=False)
    job.view = SimpleNamespace(say=said.append)
    (tmp_path / "plan.json").write_text('{"format": "spu plan", "version": 5}')
    assert job.plan() is None
    assert "plan.json is of an earlier spu: planned again" in said[0]
    for damaged in ("{", '{"format": "spu plan", "version": 999}', "[]"):
        (tmp_path / "plan.json").write_text(damaged)
        with pytest.raises(ValueError, match="plan.json"):
            job.plan()
