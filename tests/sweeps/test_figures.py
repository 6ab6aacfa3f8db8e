"""The figures of a sweep: the kind of figure for each number of swept keys, and the numbers in the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sweeps.test_summary import write_job
from zfnet.sweeps.figures import draw_sweep
from zfnet.sweeps.summary import read_sweep


def texts(axis) -> set[str]:
    return {text.get_text() for text in axis.texts}


def test_draw_two_keys_is_a_heat_map_with_means(tmp_path: Path) -> None:
    for seed in (0, 1):
        for lr in (0.01, 0.1):
            for size in (5, 7):
                words = f"optimizer.lr={lr}", f"model.conv1.kernel_size={size}", f"seed={seed}"
                write_job(tmp_path, *words, accuracy=lr + size / 100 + seed / 10)
    figures = draw_sweep(read_sweep(tmp_path))
    axis = figures["objective"].axes[0]
    assert texts(axis) == {"11.0%\n± 7.1", "13.0%\n± 7.1", "20.0%\n± 7.1", "22.0%\n± 7.1"}
    assert {axis.get_xlabel(), axis.get_ylabel()} == {"model.conv1.kernel_size", "optimizer.lr"}
    assert len(figures["curves"].axes[1].lines) == 8  # every job has a line
    assert len(figures["curves"].legends[0].get_texts()) == 4  # every setting has a name
    figures["objective"].canvas.draw()
    figures["curves"].canvas.draw()


def test_draw_two_keys_frames_the_best_and_what_seeds_cannot_tell_from_it(tmp_path: Path) -> None:
    for seed, noise in enumerate((0.0, 0.01, 0.03)):
        for lr in (0.01, 0.1):
            for size in (5, 7):
                accuracy = 0.5 * (lr == 0.1) + 0.3 + (noise + 0.005 if size == 7 else 0.02 - noise / 2)
                words = f"optimizer.lr={lr}", f"model.conv1.kernel_size={size}", f"seed={seed}"
                write_job(tmp_path, *words, accuracy=accuracy)
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("model.conv1.kernel_size", "optimizer.lr")
    frames = {frame.get_linestyle(): [round(x) for x in frame.get_center()] for frame in axis.patches}
    assert frames == {"-": [1, 1], "--": [0, 1]}
    assert "dashed: not distinguishable" in axis.get_title()


def test_draw_one_key_has_error_bars_on_a_log_axis(tmp_path: Path) -> None:
    for n, lr in enumerate((0.001, 0.01, 0.1)):
        write_job(tmp_path, f"optimizer.lr={lr}", accuracy=n / 10)
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    assert [round(x) for x in axis.get_xticks()] == [-3, -2, -1]  # logarithms of the values


def test_draw_one_key_has_numbers_in_order_before_null(tmp_path: Path) -> None:
    for n, value in enumerate(("null", "10", "2", "0.5")):
        write_job(tmp_path, f"trainer.clip_norm={value}", accuracy=n / 10)
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.5", "2", "10", "null"]


def test_draw_one_key_of_a_search_is_a_scatter_on_a_log_axis(tmp_path: Path) -> None:
    rates = [10 ** (-4 + n / 5) for n in range(15)]
    for n, lr in enumerate(rates):
        write_job(tmp_path, f"optimizer.lr={lr}", accuracy=n / 100)
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert axis.get_xscale() == "log"
    (points,) = axis.lines
    assert points.get_linestyle() == "None"
    assert points.get_xdata() == pytest.approx(rates)
    assert axis.get_title() == "Validation accuracy (one run each)"


def test_draw_two_keys_of_a_search_has_the_axes_of_its_intervals(tmp_path: Path) -> None:
    for n in range(15):
        write_job(
            tmp_path, f"optimizer.lr={10 ** (-4 + n / 5)}", f"model.dropout={0.03 + n * 7 % 15 / 30}", accuracy=n / 50
        )
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    scales = {axis.get_xlabel(): axis.get_xscale(), axis.get_ylabel(): axis.get_yscale()}
    assert scales == {"optimizer.lr": "log", "model.dropout": "linear"}
    axis.figure.canvas.draw()


def test_figures_name_their_number_of_seeds(tmp_path: Path) -> None:
    for lr, seeds in (0.01, 2), (0.1, 3):
        for seed in range(seeds):
            write_job(tmp_path, f"optimizer.lr={lr}", f"seed={seed}", accuracy=lr + seed / 10)
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert axis.get_title() == "Validation accuracy (mean ± std over seeds, n = 2 to 3; one dot per seed)"


def test_draw_two_keys_of_a_search_is_points_in_a_plane(tmp_path: Path) -> None:
    for n in range(1, 8):
        write_job(tmp_path, f"optimizer.lr={n / 100}", f"optimizer.weight_decay={n / 1000}", accuracy=n / 10)
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert len(axis.collections[0].get_offsets()) == 7
    assert axis.collections[1].get_offsets().tolist() == [[0.07, 0.007]]  # the ring is around the best


@pytest.mark.parametrize("last", ["scheduler=constant", "trainer.clip_norm=null"])
def test_draw_parallel_takes_any_values(tmp_path: Path, last: str) -> None:
    for n, extra in enumerate([last, "trainer.clip_norm=2", "trainer.clip_norm=3"]):
        words = f"optimizer.lr=0.{n + 1}", f"optimizer.betas=[0.9,0.99{n}]", extra
        write_job(tmp_path, *words, accuracy=n / 10)
    figure = draw_sweep(read_sweep(tmp_path))["objective"]
    axis = figure.axes[0]
    best = [line for line in axis.lines if line.get_linewidth() > 2]
    assert len(best) == 1
    assert best[0].get_ydata()[-1] == 1.0  # the best line ends at the top of the last axis
    figure.canvas.draw()


def test_draw_sweep_curves_holds_every_epoch_and_an_accuracy_of_zero(tmp_path: Path) -> None:
    write_job(tmp_path, "seed=0", accuracy=0.0)
    [line] = draw_sweep(read_sweep(tmp_path))["curves"].axes[1].lines
    assert line.get_xydata().tolist() == [[1, 0], [2, 0]]


def test_draw_sweep_leaves_out_keys_with_one_value(tmp_path: Path) -> None:
    for n in range(3):
        write_job(tmp_path, f"optimizer.lr=0.{n + 1}", "trainer.clip_norm=1", accuracy=n / 10)
    write_job(tmp_path, "optimizer.lr=0.5", "trainer.clip_norm=2", state="pruned")
    axis = draw_sweep(read_sweep(tmp_path))["objective"].axes[0]
    assert axis.get_xlabel() == "optimizer.lr"
    assert len(axis.get_xticks()) == 3


def test_draw_sweep_counts_the_settings_without_a_result(tmp_path: Path) -> None:
    for n in range(1, 4):
        write_job(tmp_path, f"optimizer.lr={n / 100}", accuracy=n / 10)
    write_job(tmp_path, "optimizer.lr=0.5", state="pruned")
    figure = draw_sweep(read_sweep(tmp_path))["objective"]
    assert figure.get_suptitle() == "not shown: 1 of 4 settings, which have no result"


def test_draw_sweep_without_results_is_curves_only(tmp_path: Path) -> None:
    write_job(tmp_path, "seed=0", state="running")
    assert set(draw_sweep(read_sweep(tmp_path))) == {"curves"}
