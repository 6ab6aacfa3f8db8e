"""The script for a machine with a GPU: it works to its end on the CPU, and a stage that fails or hangs costs itself."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import first_gpu
from benchmarks.first_gpu import STAGES, Setting, judge, read_report, run_stage, start_stage
from tests.helpers import compose


def test_a_rehearsal_writes_every_file_and_judges_every_target(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.benchmark.matmul_peak", lambda _: 1e12)  # the slowest part here
    stages = [name for name in STAGES if name != "tests"]  # pytest within pytest
    first_gpu.main([str(tmp_path), "--rehearse", "--stages", *stages])
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: found[name]["state"] for name in stages} == dict.fromkeys(stages, "done")
    assert found["summary"]["rehearsal"]
    verdicts = {row["target"]: row["verdict"] for row in found["summary"]["targets"]}
    assert set(verdicts.values()) <= {"met", "missed", "open"}
    # not without pytest and other people's loops
    assert [target for target, verdict in verdicts.items() if verdict == "open"] == [
        "all tests of tests/gpu pass",
        "≥ 3× timm (×)",
        "≥ 3× Lightning (×)",
    ]
    assert verdicts["equal bits where they are promised"] == "met"
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 100_000
    assert "written to" in capsys.readouterr().out


def test_a_stage_that_fails_keeps_what_it_found(tmp_path: Path, monkeypatch) -> None:
    def fails(setting: Setting):
        yield {"first": 1}
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setitem(STAGES, "atlas", (fails, 1))
    setting = Setting(tmp_path, True)
    run_stage(setting, "atlas")
    assert setting.read("atlas") == {"first": 1, "state": "failed: RuntimeError: CUDA error: an illegal memory access"}


def test_a_stage_has_a_limit_in_time(tmp_path: Path, monkeypatch) -> None:
    setting = Setting(tmp_path, False)
    setting.write("atlas", {"first": 1, "state": "unfinished"})
    (tmp_path / "sleep.py").write_text(f"import os; os.system('sleep 1; touch {tmp_path}/late; sleep 60')")
    monkeypatch.setattr(first_gpu, "__file__", str(tmp_path / "sleep.py"))
    start_stage(setting, "atlas", 0.5)
    assert setting.read("atlas") == {"first": 1, "state": "ended after 0.5 s"}
    time.sleep(0.8)
    assert not (tmp_path / "late").exists()  # what the stage had started has ended with it
    (tmp_path / "sleep.py").write_text("raise SystemExit(3)")
    start_stage(setting, "atlas", 60)
    assert setting.read("atlas")["state"] == "ended with code 3"


def test_the_report_of_the_tests_names_what_failed(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"><failure '
        'message="no">long</failure></testcase><testcase classname="a" name="three"><skipped/></testcase></testsuite>'
        "</testsuites>"
    )
    assert read_report(tmp_path / "r.xml") == {"tests": 3, "failed": {"a::two": "no"}, "skipped": 1}
    assert read_report(tmp_path / "none.xml")["failed"]


def test_epochs_use_the_given_folder(tmp_path: Path) -> None:
    words = Setting(tmp_path, False, tmp_path / "cifar10").cifar10_words()
    assert compose(*words).data.root == str(tmp_path / "cifar10")
    built_in = compose(*Setting(tmp_path, False).cifar10_words()).data
    assert (built_in.train_images, built_in.test_images) == (50_000, 10_000)


def test_what_was_not_measured_stays_open() -> None:
    assert judge("t", "1", None, lambda x: x)["verdict"] == "open"
    assert [judge("t", "1", x, lambda x: x < 2)["verdict"] for x in (1, 2)] == ["met", "missed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["first_gpu.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="--rehearse"):
        first_gpu.main()
    assert not (tmp_path / "out").exists()
