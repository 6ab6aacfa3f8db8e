"""job=compare: the same summary, made again."""

from __future__ import annotations

from pathlib import Path

from tests.sweeps.test_summary import write_job


def test_compare_writes_the_summary_again(run_py, tmp_path: Path) -> None:
    for n, lr in enumerate((0.01, 0.1)):
        write_job(tmp_path, f"optimizer.lr={lr}", accuracy=n / 10)
    answer = run_py("job=compare", f"job.sweep={tmp_path}")
    assert answer.code == 0
    assert "2 settings, 2 jobs: 2 done" in answer.out
    assert (tmp_path / "summary.csv").read_text().count("\n") == 3
    assert (tmp_path / "figures/objective.png").is_file()


def test_compare_refuses_a_folder_without_training(run_py, tmp_path: Path) -> None:
    for words in (["job.sweep=nowhere"], ["job.sweep=."], []):
        answer = run_py("job=compare", *words)
        assert answer.code == 1
        assert answer.err.startswith("error: job.sweep")
        assert answer.err.count("\n") == 1
