"""The analyses as commands: bad input gives one line, and the run that they read does not change."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import load_for_job
from zfnet.config.schema import Config
from zfnet.explain.selection import Look, choose_images, predict
from zfnet.plots.figures import new_figure, save_figure, styled
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import own_directory
from zfnet.runs.tables import to_rows
from zfnet.training.loaded import LoadedRun

QUICK = ("trainer.threads=1",)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["job=occlusion"], "job=occlusion needs run=<dir>"),
        (
            ["job=occlusion", "job.layer=conv9"],
            "job.layer=conv9: the network has no such convolution; did you mean 'conv5'?",
        ),
        (["job=occlusion", "job.layer=fc7"], "job.layer=fc7: the network has no such convolution; known: conv1"),
        (["job=occlusion", "job.patch=64"], "job.patch=64: the occluder must be smaller than the image"),
        (["job=occlusion", "job.patch=8", "job.stride=9"], "job.stride=9: must be at most job.patch=8"),
        (["job=occlusion", "job.split=tset"], "job.split=tset: must be one of auto, train, validation or test"),
        (["job=occlusion", "job.fill=300"], "job.fill=300: must be at most 255"),
        (["job=occlusion", "images=[nope.jpg]"], "nope.jpg: there is no such file"),
        (
            ["job=invariance", "job.layers=[conv1,fc9]"],
            "job.layers=fc9: the network has no such layer; did you mean 'fc",
        ),
        (["job=evolution"], "job=evolution needs run=<dir>"),
        (
            ["job=evolution", "job.layers=[conv6]"],
            "job.layers=conv6: the network has no such convolution; did you mean 'conv5'?",
        ),
        (["job=evolution", "job.split=test"], "train with 'trainer.snapshots=[1,2,5,10]'"),
        (["job=filters", "job.other=nowhere"], "job.other=nowhere: there is no run"),
        (["job=correspondence", "job.points=no.csv"], "job.points=no.csv cannot be read"),
        (["job=correspondence", "job.count=1"], "job.count=1: must be at least 2"),
        (
            ["job=deconvnet", "job.layers=[conv6]"],
            "job.layers=conv6: the network has no such convolution; did you mean",
        ),
        (["job=deconvnet", "job.layers=[fc7]"], "job.layers=fc7: the network has no such convolution; known: conv1"),
        (
            ["job=deconvnet", "job.layers=[pool1]"],
            "job.layers=pool1: the network has no such convolution; known: conv1",
        ),
        (
            ["job=deconvnet", "job.verdict=nowhere"],
            "job.verdict=nowhere: contains no verdict of this network with maps.csv",
        ),
        (["job=deconvnet", "job.layers=[]"], "job.layers=[]: names no layer"),
        (["job=deconvnet", "job.top=0"], "job.top=0: must be at least 1"),
        (["job=deconvnet", "job.rule=relu"], "job.rule=relu: must be one of deconvnet, guided or gradient"),
        (["job=deconvnet", "job.split=all"], "job.split=all: must be one of auto, train, validation or test"),
        (["job=deconvnet", "job.tops=3"], "job.tops: no such key"),
        (["job=deconvnet", "data.image_size=96"], "data.image_size=96: the run's network expects images of 64 px"),
        (["job=invariance", "job.steps=2"], "job.steps=2: must be at least 3"),
    ],
)
def test_analyses_refuse_bad_input_in_one_line(
    run_py, tiny_run: RunDirectory, tmp_path: Path, words: list[str], expected: str
) -> None:
    given = words if len(words) == 1 else [*words, f"run={tiny_run.folder}"]
    answer = run_py(*given, "hydra.run.dir=out", *QUICK)
    assert expected in answer.error
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_analyses_do_not_write_to_the_run(run_py, tiny_run: RunDirectory) -> None:
    before = sorted(p.name for p in tiny_run.folder.iterdir())
    answer = run_py("job=occlusion", f"run={tiny_run.folder}", f"hydra.run.dir={tiny_run.folder}", *QUICK)
    assert answer.code == 1
    assert "is not empty and contains a run: choose another directory" in answer.err
    assert sorted(p.name for p in tiny_run.folder.iterdir()) == before


@dataclass(kw_only=True)
class Confidence(Look):
    """A user-defined analysis (see zfnet/explain/selection.py)."""

    count: int

    def main(self, config: Config, output: Path) -> None:
        loaded = LoadedRun(config)
        chosen = choose_images(loaded, config, self.count)
        with own_directory(config, output) as run:
            rows = to_rows(image=chosen.names, confidence=predict(loaded, chosen.inputs).amax(1).tolist())
            run.write_csv("confidence.csv", rows)
            save_figure(self.draw([row["confidence"] for row in rows]), run.figures / "confidence.png")

    @styled()
    def draw(self, values: list[float]):
        figure = new_figure(figsize=(4, 3))
        figure.subplots().bar(range(len(values)), values)
        return figure


def test_user_defined_analysis_is_one_class(tiny_run: RunDirectory, tmp_path: Path) -> None:
    config = load_for_job(tiny_run).config
    config = dataclasses.replace(config, job=Confidence(name="confidence", split="test", count=3))
    config.job.main(config, tmp_path / "out")
    assert len((tmp_path / "out/confidence.csv").read_text().splitlines()) == 4
    assert (tmp_path / "out/figures/confidence.png").exists()
    assert RunDirectory(tmp_path / "out").state == "done"
