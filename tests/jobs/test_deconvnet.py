"""job=deconvnet from the command line: what it writes, going on after a stop, and bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zfnet import load_run
from zfnet.data import load_splits, preprocess
from zfnet.explain import Deconvnet, receptive_box
from zfnet.runs.signals import Stopped

SMALL = (
    "job=deconvnet",
    "job.split=train",
    "job.max_images=60",
    "data.batch_size=4",
    "job.top=3",
    "job.maps=5",
    "job.layers=[conv1,conv4]",
    "trainer.device=cpu",
)


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    """Return what a job says: all but logs, times and the search's state."""
    skipped = {"deconvnet.log", "status.json", ".lock", "search.safetensors"}
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in skipped and ".hydra" not in p.parts and p.name != "config.yaml"
    }


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_all_it_writes_and_going_on_after_a_stop(
    run_py, tiny_run, tmp_path: Path, monkeypatch, one_thread
) -> None:
    before = files(tiny_run.folder)
    answer = run_py(*SMALL, f"run={tiny_run.folder}", "hydra.run.dir=whole")
    assert (answer.code, answer.err) == (0, "")
    assert "60 train images" in answer.out
    assert files(tiny_run.folder) == before
    whole = tmp_path / "whole"
    for name in ("controls", "deconvnet_conv1", "deconvnet_conv4"):
        assert (whole / f"figures/{name}.png").stat().st_size > 10_000
    assert (whole / "atlas/index.html").is_file()

    # every number of the table holds, recomputed one by one
    run = load_run(tiny_run.folder)
    images = load_splits(run.config.data).train.take(torch.linspace(0, 179, 60).round().long())
    inputs = preprocess(images.pixels(range(len(images))), run.config.data)
    for layer in ("conv1", "conv4"):
        activations = run.model.activations(inputs, [layer])[layer].detach()
        table = [r for r in rows(whole / "top_activations.csv") if r["layer"] == layer]
        assert len(table) > 80
        for row in table:
            n, c, y, x = (int(row[k]) for k in ("image", "map", "y", "x"))
            assert activations[n, c, y, x].item() == pytest.approx(float(row["activation"]), rel=1e-4)
            assert row["class"] == run.classes[images.labels[n]]
            box = tuple(int(row[k]) for k in ("top", "left", "bottom", "right"))
            assert box == receptive_box(run.model, layer, y, x)
        best = activations.amax((2, 3)).sort(0, descending=True).values[:3]
        for row in table:
            expected = best[int(row["rank"]) - 1, int(row["map"])].item()
            assert float(row["activation"]) == pytest.approx(expected, rel=1e-4)
        drawn = load_file(whole / f"projections/{layer}.safetensors")
        assert len(drawn["units"][:, 1].unique()) == 5
        ours = Deconvnet(run.model).project(inputs, layer, drawn["units"])
        assert drawn["projections"].abs().sum().item() == pytest.approx(ours.abs().sum().item(), rel=1e-4)
    habits = rows(whole / "maps.csv")
    assert [r["layer"] for r in habits] == ["conv1"] * 32 + ["conv4"] * 96
    assert json.loads((whole / "controls.json").read_text())["conv4"].keys() == {
        "random_weights",
        "other_switches",
        "other_unit",
    }

    # stopped in the middle of the search, then of the atlas, it goes on and ends with the same bytes
    from zfnet.explain.top_activations import TopActivations
    from zfnet.plots import atlas

    with monkeypatch.context() as patch:
        add = TopActivations.add

        def stop_at_once(self, *batch) -> None:
            if self.images:
                raise Stopped(15)
            add(self, *batch)

        patch.setattr(TopActivations, "add", stop_at_once)
        patch.setattr("zfnet.analyses.deconvnet._SAVE_SECONDS", 0.0)
        assert run_py(*SMALL, f"run={tiny_run.folder}", "hydra.run.dir=part").code == 143
    with monkeypatch.context() as patch:
        patch.setattr(atlas, "_sheet", lambda *_: (_ for _ in ()).throw(Stopped(15)))
        answer = run_py(*SMALL, f"run={tiny_run.folder}", "hydra.run.dir=part")
        assert answer.code == 143
        assert "going on after 4 images" in answer.out
    assert json.loads((tmp_path / "part/status.json").read_text())["state"] == "stopped"
    assert run_py(*SMALL, f"run={tiny_run.folder}", "hydra.run.dir=part").code == 0
    assert files(tmp_path / "part") == files(whole)
    answer = run_py(*SMALL, f"run={tiny_run.folder}", "hydra.run.dir=part")
    assert "nothing to do" in answer.out
    answer = run_py(*SMALL, f"run={tiny_run.folder}", "hydra.run.dir=part", "job.top=2")
    assert answer.err == (
        "error: part holds a job with other settings: choose another directory (hydra.run.dir=…)\n"
    )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("job.layers=[conv6]", "job.layers=conv6: no such convolution layer; did you mean"),
        ("job.layers=[fc7]", "job.layers=fc7: no such convolution layer"),
        ("job.layers=[]", "job.layers=[]: names no layer"),
        ("job.top=0", "job.top=0: must be at least 1"),
        ("job.rule=relu", "job.rule=relu: must be one of deconvnet, guided, gradient"),
        ("job.split=all", "job.split=all: must be one of auto, train, validation, test"),
        ("job.tops=3", "job.tops: no such key"),
        ("data.image_size=96", "data.image_size=96: the run's network takes images of 64 px"),
    ],
)
def test_bad_input_gets_one_line(run_py, tiny_run, tmp_path: Path, word: str, message: str) -> None:
    answer = run_py("job=deconvnet", f"run={tiny_run.folder}", word)
    assert answer.code == 1
    assert message in answer.err
    assert answer.err.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_runs_own_directory_is_refused(run_py, tiny_run) -> None:
    answer = run_py(*SMALL, f"run={tiny_run.folder}", f"hydra.run.dir={tiny_run.folder}")
    assert answer.code == 1
    assert "choose another directory" in answer.err
