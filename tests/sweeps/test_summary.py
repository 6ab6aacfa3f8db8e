"""The summary of a sweep directory, read from run directories that the tests write without training."""

from __future__ import annotations

import copy
import functools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from tests.helpers import TINY, compose
from zfnet.config.schema import flatten
from zfnet.runs.command import compose_raw
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import register_resolvers
from zfnet.sweeps.summary import (
    ABSENT,
    _result_settings,
    format_value,
    p_against_best,
    read_sweep,
    read_training,
    short_names,
    swept_keys,
    to_text,
)


def write_job(
    sweep: Path, *words: str, accuracy: float | None = None, test: float = 0.5, state: str = "done", loss: float = 1.0
) -> RunDirectory:
    """Write the directory that a training with these overrides and accuracies would write."""
    run = RunDirectory(sweep / ",".join(words))
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(yaml.safe_dump(_plain_config(words), sort_keys=False))
    run.set_status(state, "lost the loss" if state == "failed" else None)
    run.write_history([{"epoch": e, "step": e, "train_loss": 1 / e, "validation_accuracy": accuracy} for e in (1, 2)])
    if accuracy is not None:
        figures = {"validation": {"accuracy": accuracy, "loss": loss}, "test": {"accuracy": test}}
        run.write_json("results.json", {**figures, "best_epoch": 2, "epochs": 2, "seconds": 1.5})
    return run


@functools.cache
def _base() -> DictConfig:
    register_resolvers()
    return compose_raw(TINY)


def _plain_config(words: Sequence[str]) -> dict[str, Any]:
    """Return the config of these overrides. If they only set keys, update a cached config, which is much faster."""
    if any("." not in word.partition("=")[0] for word in words if not word.startswith("seed=")):
        return compose(*TINY, *words).to_dict()
    config = copy.deepcopy(_base())
    for word in words:
        key, _, value = word.partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value))
    return OmegaConf.to_container(config, resolve=True)


def test_read_sweep_groups_seeds_and_ranks_by_validation(tmp_path: Path) -> None:
    low, high = (0.2, 0.3, 0.7), (0.5, 0.6, 0.7)
    for seed in range(3):
        write_job(tmp_path, "optimizer.lr=0.01", f"seed={seed}", accuracy=low[seed], test=0.9)
        write_job(tmp_path, "optimizer.lr=0.1", f"seed={seed}", accuracy=high[seed], test=0.1)
    sweep = read_sweep(tmp_path)
    assert sweep.keys == ["optimizer.lr"]  # without scheduler.max_lr, which follows it, and the seed
    assert [s.values for s in sweep.settings] == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.01}]
    assert [job.seed for job in sweep.settings[0].jobs] == [0, 1, 2]
    mean, std = sweep.settings[0].mean_and_std()
    assert mean == pytest.approx(0.6)
    assert std == pytest.approx(0.1)
    assert sweep.settings[1].mean_and_std()[1] == pytest.approx(statistics.stdev(low))


def test_read_sweep_ranks_settings_of_equal_accuracy_by_loss(tmp_path: Path) -> None:
    for rate, accuracy, loss in ((1, 0.5, 1.2), (2, 0.5, 1.1), (3, 0.4, 0.9), (4, 0.5, 1.3)):
        write_job(tmp_path, f"optimizer.lr={rate}", accuracy=accuracy, loss=loss)
    write_job(tmp_path, "optimizer.lr=5", state="failed")
    assert [s.values["optimizer.lr"] for s in read_sweep(tmp_path).settings] == [2, 1, 4, 3, 5]


def on_data(run: RunDirectory, root: str, fingerprint: str | None) -> None:
    """Change a job's record as if it had been trained on this data."""
    plain = run.recorded_config()
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**plain, "data": {**plain["data"], "root": root}}))
    if fingerprint is not None:
        run.write_json("environment.json", {"data_fingerprint": fingerprint})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([("photos", "f1"), ("photos", "f1"), ("photos", None)], {None: 3}),
        ([("photos", "f1"), ("moved", "f1"), ("moved", "f1")], {None: 3}),  # the content counts, not the path
        ([("photos", "f1"), ("others", "f2"), ("others", "f2")], {"photos": 1, "others": 2}),
        ([("photos", "f1"), ("photos", "f2"), ("photos", "f2")], {"photos (f1)": 1, "photos (f2)": 2}),
        ([("photos", "f1"), ("moved", "f1"), ("moved", "f2")], {"photos": 2, "moved": 1}),
    ],
)
def test_read_sweep_never_means_over_several_data_sets(tmp_path: Path, data: list, expected: dict) -> None:
    for seed, (root, fingerprint) in enumerate(data):
        on_data(write_job(tmp_path, f"seed={seed}", accuracy=0.2), root, fingerprint)
    sweep = read_sweep(tmp_path)
    assert {s.values.get("data.root"): len(s.jobs) for s in sweep.settings} == expected
    assert sweep.keys == (["data.root"] if len(expected) > 1 else [])


def test_read_sweep_over_data_root_beside_another_key(tmp_path: Path) -> None:
    for lr in ("0.1", "0.2"):
        for root in ("a", "b"):
            on_data(write_job(tmp_path, f"optimizer.lr={lr}", f"seed={ord(root)}", accuracy=0.5), root, f"{root}{lr}")
    sweep = read_sweep(tmp_path)
    assert sweep.keys == ["optimizer.lr", "data.root"]
    assert [len(setting.jobs) for setting in sweep.settings] == [1] * 4


def test_read_sweep_scores_finished_jobs_only(tmp_path: Path) -> None:
    write_job(tmp_path, "seed=0", accuracy=0.4)
    write_job(tmp_path, "seed=1", accuracy=0.9, state="pruned")
    write_job(tmp_path, "seed=2", state="failed")
    refused = RunDirectory(tmp_path / "optimizer.lr=-1")
    refused.folder.mkdir()
    refused.set_status("failed", "optimizer.lr=-1: must be greater than 0")
    sweep = read_sweep(tmp_path)
    assert [s.scores() for s in sweep.settings] == [[0.4]]
    assert sweep.settings[0].mean_and_std() == (0.4, None)
    assert {job.name: job.error for job in sweep.jobs if job.state == "failed"} == {
        "seed=2": "lost the loss",
        "optimizer.lr=-1": "optimizer.lr=-1: must be greater than 0",
    }


def test_read_sweep_names_killed_jobs_and_those_in_use(tmp_path: Path) -> None:
    runs = [write_job(tmp_path, f"seed={seed}", state="running") for seed in (0, 1)]
    with runs[0].lock():
        assert to_text(read_sweep(tmp_path)).startswith("1 setting, 2 jobs: 1 running, 1 killed\n")


def test_read_sweep_ignores_results_that_are_not_finite(tmp_path: Path) -> None:
    for n, (accuracy, loss) in enumerate(((0.5, math.nan), (math.nan, 0.5), (0.5, 0.5))):
        write_job(tmp_path, f"optimizer.lr={n + 1}", accuracy=accuracy, loss=loss)
    settings = read_sweep(tmp_path).settings
    assert [(s.values["optimizer.lr"], s.scores()) for s in settings] == [(3, [0.5]), (1, [0.5]), (2, [])]


def test_a_seed_that_was_trained_twice_counts_once(tmp_path: Path) -> None:
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        write_job(tmp_path / place, "seed=0", accuracy=0.4)
    write_job(tmp_path / "second", "seed=1", accuracy=0.6)
    (setting,) = read_sweep(tmp_path).settings
    assert sorted(setting.scores()) == [0.4, 0.6]
    assert setting.mean_and_std()[0] == pytest.approx(0.5)


def test_read_sweep_takes_damaged_files_and_other_jobs(tmp_path: Path) -> None:
    write_job(tmp_path, "seed=0", accuracy=0.4)
    for name, damage in (("a", "config.yaml"), ("b", "results.json"), ("c", "history.csv"), ("d", "status.json")):
        run = write_job(tmp_path, f"optimizer.lr=0.{ord(name)}", accuracy=0.4)
        (run.folder / damage).write_bytes(b"\xff{: [")
    for number, seed in enumerate(("x", "[2]", "1.5")):
        run = write_job(tmp_path, "seed=9", f"optimizer.lr=0.{number}1", accuracy=0.4)
        text = (run.folder / "config.yaml").read_text()
        (run.folder / "config.yaml").write_text(text.replace("seed: 9", f"seed: {seed}"))
        assert read_training(run, "").seed is None
    run = write_job(tmp_path, "optimizer.lr=0.4", accuracy=0.4)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("lr: 0.4", "lr: 2020-01-01"))  # YAML has dates
    other = write_job(tmp_path, "seed=7", accuracy=0.4)
    text = (other.folder / "config.yaml").read_text()
    (other.folder / "config.yaml").write_text(text.replace("name: train", "name: evaluate"))
    sweep = read_sweep(tmp_path)
    assert "seed=7" not in {job.name for job in sweep.jobs}
    assert len(sweep.jobs) == 9
    assert {len(s.scores()) for s in sweep.settings} == {0, 1}


def flat(*words: str) -> dict[str, Any]:
    return flatten(_plain_config(words))


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        ([["optimizer.lr=0.1"], ["optimizer.lr=0.2"]], ["optimizer.lr"]),
        # the choice of a group determines the group's other keys
        ([["model=small"], ["model=alexnet_stem"]], ["model.name"]),
        ([["optimizer=sgd"], ["optimizer=adamw"]], ["optimizer._target_"]),
        # but not a key that is swept, too
        (
            [[f"optimizer={o}", f"optimizer.lr={lr}"] for o in ("sgd", "adamw") for lr in (0.1, 0.2)],
            ["optimizer._target_", "optimizer.lr"],
        ),
        # in a search no value occurs twice, but neither key follows the other
        (
            [[f"optimizer.lr=0.{n}", f"trainer.epochs={10 - n}"] for n in range(1, 6)],
            ["optimizer.lr", "trainer.epochs"],
        ),
        # two settings of one group that change together
        (
            [[f"augment.crop_padding={n}", f"augment.cutout={n}"] for n in (0, 4)],
            ["augment.crop_padding", "augment.cutout"],
        ),
        ([["model.conv3=null"], []], ["model.conv3", "model.conv3.channels"]),
        ([[], []], []),
    ],
)
def test_swept_keys(jobs, expected) -> None:
    keys = swept_keys([flat(*words) for words in jobs])
    assert keys[: len(expected)] == expected
    if "model.conv3" not in expected:  # without a layer, all keys of the layer are missing
        assert keys == expected


def test_swept_keys_that_were_typed_follow_no_other() -> None:
    settings = [flat("optimizer=adamw"), flat("optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.5")]
    assert swept_keys(settings) == ["optimizer._target_"]
    assert swept_keys(settings, {"optimizer", "optimizer.lr"}) == ["optimizer._target_", "optimizer.lr"]


def test_short_names() -> None:
    keys = ["model.conv1.kernel_size", "model.conv2.kernel_size", "optimizer.lr", "model.name", "optimizer._target_"]
    assert short_names(keys) == {
        "model.conv1.kernel_size": "conv1.kernel_size",
        "model.conv2.kernel_size": "conv2.kernel_size",
        "optimizer.lr": "lr",
        "model.name": "model",
        "optimizer._target_": "optimizer",
    }


def test_format_value_is_as_on_the_command_line() -> None:
    values = (["conv1", None, True, 0.1234567], "zfnet.training.muon.Muon", 0.99999, 0.0019000539994977004, 1.0)
    assert [*map(format_value, values)] == ["[conv1, null, true, 0.1234567]", "Muon", "0.99999", "0.0019", "1"]


def test_read_sweep_marks_a_key_that_a_setting_does_not_have(tmp_path: Path) -> None:
    write_job(tmp_path, "optimizer=sgd", "optimizer.momentum=0.5", accuracy=0.1)
    write_job(tmp_path, "optimizer=sgd", "optimizer.momentum=0.8", accuracy=0.2)
    write_job(tmp_path, "optimizer=adagrad", accuracy=0.3)
    sweep = read_sweep(tmp_path)
    assert sweep.settings[0].values["optimizer.momentum"] == ABSENT


def test_to_text_fits_80_columns_with_mean_std_and_n(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        write_job(tmp_path, "optimizer.lr=0.01", f"seed={seed}", accuracy=accuracy)
    write_job(tmp_path, "optimizer.lr=0.1", "seed=0", state="failed")
    text = to_text(read_sweep(tmp_path), 80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "2 settings, 4 jobs: 3 done, 1 failed"
    assert lines[1].split() == ["lr", "validation", "accuracy", "±", "std", "n", "state"]
    assert lines[2].split() == ["0.01", "60.00", "±", "10.00%", "3", "3", "done"]
    assert lines[3].split() == ["0.1", "–", "0", "failed"]


def test_to_text_leaves_out_states_before_a_key(tmp_path: Path) -> None:
    for seed in range(2):
        for lr in (0.01, 0.1):
            words = (f"model.conv1.kernel_size={7 if lr < 0.1 else 9}", f"optimizer.lr={lr}", f"seed={seed}")
            write_job(tmp_path, *words, accuracy=lr + seed / 100)
    write_job(tmp_path, "model.conv1.kernel_size=9", "optimizer.lr=0.1", "seed=2", state="failed")
    sweep = read_sweep(tmp_path)
    wide = to_text(sweep, 100).splitlines()
    narrow = to_text(sweep, len(wide[1]) - 1).splitlines()
    assert wide[1].endswith("state")
    assert "state" not in narrow[1]
    assert {"kernel_size", "lr"} <= {*narrow[1].split()}
    assert narrow[0] == "2 settings, 5 jobs: 4 done, 1 failed"


def test_to_text_counts_columns_and_rows_that_do_not_fit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.sweeps.summary.MOST_ROWS", 2)
    keys = ("optimizer.lr", "model.dropout", "trainer.clip_norm", "loss.label_smoothing", "optimizer.eps")
    for n in range(1, 6):
        write_job(tmp_path, *(f"{key}={n / 1000 + k / 100}" for k, key in enumerate(keys)), accuracy=n / 100)
    text = to_text(read_sweep(tmp_path), 60)
    assert "… and 3 more, in summary.csv" in text
    assert "not shown, but in summary.csv: clip_norm\n" in text
    assert max(map(len, text.splitlines()[:-1])) <= 60
    assert "5.00%" in text  # the best setting; the accuracy column is never left out


def test_to_text_shortens_a_wide_column_before_it_leaves_one_out(tmp_path: Path) -> None:
    for lr in (0.001, 0.002):
        words = (f"data.mean={[lr + 0.123456789] * 3}", f"optimizer.lr={lr}")
        write_job(tmp_path, *words, accuracy=100 * lr)
    lines = to_text(read_sweep(tmp_path), 60).splitlines()
    assert max(map(len, lines[:4])) <= 60
    assert lines[1].split()[:2] == ["mean", "lr"]
    assert ["0.002" in lines[2], "0.001" in lines[3]] == [True, True]
    assert "not shown" not in "".join(lines)


def test_to_text_reports_test_for_the_setting_that_validation_chose(tmp_path: Path) -> None:
    write_job(tmp_path, "optimizer.lr=0.1", accuracy=0.5, test=0.11)
    write_job(tmp_path, "optimizer.lr=0.2", accuracy=0.4, test=0.99)
    text = to_text(read_sweep(tmp_path), 80)
    assert "Test accuracy of the best setting by validation: 11.00% (n = 1)" in text
    assert "99.00" not in text


def test_to_text_says_why_settings_without_validation_are_not_ranked(tmp_path: Path) -> None:
    for lr in (0.1, 0.2):
        write_job(tmp_path, f"optimizer.lr={lr}").write_json("results.json", {"validation": None, "test": {}})
    assert to_text(read_sweep(tmp_path), 80).splitlines()[-1].startswith("Not ranked: no validation images.")


def test_to_text_tests_each_setting_against_the_best(tmp_path: Path) -> None:
    """Paired by seed: t is the mean difference / its standard error; p has a closed form for 2 degrees of freedom."""
    scores = {0.1: (0.80, 0.81, 0.83), 0.01: (0.70, 0.72, 0.72), 0.2: (0.81, 0.80, 0.80)}
    for lr, accuracies in scores.items():
        for seed, accuracy in enumerate(accuracies):
            write_job(tmp_path, f"optimizer.lr={lr}", f"seed={seed}", accuracy=accuracy)
    write_job(tmp_path, "optimizer.lr=0.5", "seed=0", accuracy=0.1)
    sweep = read_sweep(tmp_path)
    p = p_against_best(sweep.settings)
    pairs = (-0.01, 0.01, 0.03), (0.10, 0.09, 0.11), (0.11, 0.08, 0.08)
    t = [statistics.fmean(d) / (statistics.stdev(d) / 3**0.5) for d in pairs]
    alone = [1 - x / (x * x + 2) ** 0.5 for x in t]  # Student's distribution at two degrees of freedom
    assert sorted(alone) == [alone[1], alone[2], alone[0]]
    assert p == [None, pytest.approx(alone[0]), pytest.approx(3 * alone[1]), None]
    lines = to_text(sweep, 80).splitlines()[1:6]
    ends = ["against the best", "best", f"unclear, p {p[1]:.2g}", f"lower, p {p[2]:.2g}", ABSENT]
    assert [line.rstrip().endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 5
    assert max(map(len, lines)) <= 80


def test_settings_of_a_branch_are_its_parents_too_and_without_the_seed() -> None:
    def settings(lr: float = 0.1, **parent: Any) -> dict[str, Any]:
        config = {"seed": parent.pop("seed", 0), "optimizer": {"lr": lr}}
        link = {"run": "x", "epoch": 2, "step": 9, "schedule": "stretch", "identity": repr(config), "config": config}
        return _result_settings({"seed": config["seed"], "parent": link | parent, "optimizer": {"lr": 0.5}})

    assert settings() == settings(seed=1)
    assert len({repr(s) for s in (settings(), settings(0.2), settings(schedule="restart"), settings(epoch=1))}) == 4
