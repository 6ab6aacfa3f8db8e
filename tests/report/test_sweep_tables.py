"""A sweep as CSV, Markdown and terminal text."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from tests.report.test_sweep import write_job
from zfnet.plots.sweep import read_sweep
from zfnet.plots.sweep_tables import to_csv, to_markdown, to_text, write_tables


def test_the_terminal_fits_80_columns_and_shows_mean_std_and_n(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        write_job(tmp_path, "optimizer.lr=0.01", f"seed={seed}", accuracy=accuracy)
    write_job(tmp_path, "optimizer.lr=0.1", "seed=0", state="failed")
    text = to_text(read_sweep(tmp_path), 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "2 settings, 4 jobs: 3 done, 1 failed"
    assert lines[1].split() == ["lr", "validation", "accuracy", "n", "state"]
    assert lines[2].split() == ["0.01", "60.00", "±", "10.00", "%", "3", "3", "done"]
    assert lines[3].split() == ["0.1", "–", "0", "failed"]


def test_columns_and_rows_that_do_not_fit_are_counted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.plots.sweep_tables.MOST_ROWS", 2)
    keys = ("optimizer.lr", "model.dropout", "trainer.clip_norm", "loss.label_smoothing", "optimizer.eps")
    for n in range(1, 6):
        write_job(tmp_path, *(f"{key}={n / 1000 + k / 100}" for k, key in enumerate(keys)), accuracy=n / 100)
    text = to_text(read_sweep(tmp_path), 60)
    assert "… and 3 more, in summary.csv" in text
    assert "not shown, but in summary.csv: 1 swept key" in text
    assert max(map(len, text.splitlines()[:-1])) <= 60
    assert "5.00 %" in text  # the best; the objective itself is never left out


def test_csv_and_markdown_hold_every_job_and_its_error_whole(tmp_path: Path) -> None:
    write_job(tmp_path, "seed=0", accuracy=0.25, test=0.75)
    run = write_job(tmp_path, "seed=1", state="failed")
    error = 'a "quoted", broken\nmessage'
    run.set_status("failed", error)
    sweep = read_sweep(tmp_path)
    write_tables(sweep)
    rows = list(csv.DictReader(io.StringIO(to_csv(sweep))))
    assert [row["state"] for row in rows] == ["done", "failed"]
    assert rows[0]["validation_accuracy"] == "0.25"
    assert rows[1]["error"] == error
    assert "0.75" not in to_csv(sweep)  # what the test set says has no place beside settings to choose from
    assert "- failed: `seed=1`" in to_markdown(sweep)
    assert (tmp_path / "summary.csv").read_text() == to_csv(sweep)
    assert (tmp_path / "summary.md").read_text() == to_markdown(sweep)


def test_the_test_set_is_reported_for_the_setting_that_validation_chose(tmp_path: Path) -> None:
    write_job(tmp_path, "optimizer.lr=0.1", accuracy=0.5, test=0.11)
    write_job(tmp_path, "optimizer.lr=0.2", accuracy=0.4, test=0.99)
    text = to_text(read_sweep(tmp_path), 80)
    assert "Test accuracy of the best setting by validation: 11.00 % (n = 1)" in text
    assert "99.00" not in text
