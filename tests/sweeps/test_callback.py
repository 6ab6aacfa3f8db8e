"""Hydra's callback around the jobs of a sweep: the files that a job leaves, and the summary of all jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from tests.helpers import read_csv
from tests.sweeps.test_summary import write_job
from zfnet.config.errors import UserError
from zfnet.sweeps import callback
from zfnet.sweeps.callback import summarize
from zfnet.sweeps.summary import read_sweep, to_markdown


def test_summarize_writes_every_job_and_its_error(tmp_path: Path) -> None:
    write_job(tmp_path, "seed=0", accuracy=0.25, test=0.75)
    run = write_job(tmp_path, "seed=1", state="failed")
    error = 'a "quoted", broken\nmessage'
    run.set_status("failed", error)
    sweep = read_sweep(tmp_path)
    summarize(tmp_path)
    text = (tmp_path / "summary.csv").read_text()
    rows = read_csv(tmp_path / "summary.csv")
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert rows[0]["validation_accuracy"] == "0.25"
    assert rows[1]["error"] == error
    assert "0.75" not in text  # the test set must not influence the choice of a setting
    assert "- failed: `seed=1`" in to_markdown(sweep)
    assert (tmp_path / "summary.md").read_text() == to_markdown(sweep)


def test_callback_removes_the_directory_of_a_job_that_writes_nothing(run_py, tmp_path) -> None:
    answer = run_py("-m", "job=summary", "model=small,alexnet_stem", "hydra.sweep.dir=s")
    assert answer.code == 0
    assert answer.out.count("conv1") >= 2
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["multirun.yaml"]


def test_a_summary_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch, capfd) -> None:
    def full(*_: Any, **__: Any) -> str:
        raise UserError("s/summary.csv cannot be written: No space left on device")

    monkeypatch.setattr(callback, "summarize", full)
    config = OmegaConf.create({"hydra": {"mode": "MULTIRUN", "sweep": {"dir": str(tmp_path)}}})
    callback.SweepReport().on_multirun_end(config)
    assert capfd.readouterr().err == "warning: s/summary.csv cannot be written: No space left on device\n"
