import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.figures import DOCS, draw_blog, draw_first_layers, draw_time, main
from tests.explain.networks import chain
from tests.helpers import train_tiny_exact
from zfnet import load_run
from zfnet.config.errors import UserError
from zfnet.runs.weights import save_model


def published(name: str) -> dict:
    return json.loads((DOCS / f"results/{name}.json").read_text())


def test_draw_blog_shows_both_runs() -> None:
    result = published("blog")
    loss, accuracy = draw_blog(result).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in accuracy.lines}
    assert lines["test, the blog"][-1] == pytest.approx(73.83)
    assert lines["test, here"] == [100 * row["test_accuracy"] for row in result["runs"][0]["epochs"]]
    assert [line.get_label() for line in loss.lines] == ["train, here", "test, here", "test, the blog"]


def test_draw_time_takes_means_and_the_least_time() -> None:
    small = [
        {"epochs": 2, "seconds": seconds, "test": {"accuracy": share}} for seconds, share in ((60, 0.5), (90, 0.7))
    ]
    fast = [
        {"command": command, "epochs": 10, "cpu_seconds": seconds, "test": {"flip_shift": share}}
        for command, seconds, share in (("B", 240, 0.9), ("B", None, 0.8), ("A", 120, 0.6), ("A", 120, 0.7))
    ]
    axis = draw_time(small, fast).axes[0]
    points = [line.get_xydata().tolist() for line, _, _ in axis.containers]
    assert points == [[pytest.approx([1, 60])], [pytest.approx([2, 65]), pytest.approx([4, 85])]]
    assert [text.get_text() for text in axis.texts] == ["2 epochs", "10 epochs", "10 epochs, wider"]


def test_draw_first_layers_puts_the_largest_filter_first(tmp_path: Path) -> None:
    run = load_run(train_tiny_exact(tmp_path / "run").folder)
    with torch.no_grad():
        run.model.conv1.weight[:] = 0
        run.model.conv1.weight[3] = 0.1
    save_model(tmp_path / "run/model.safetensors", run.model, run.metadata)
    (tmp_path / "run/results.json").unlink()  # it has the hash of the weights before
    image = draw_first_layers({"one": str(tmp_path / "run")}).axes[0].images[0].get_array()
    assert (image[:14, :14] == 255).all()
    assert (image[:14, 15:29] == 128).all()


def test_draw_first_layers_of_any_network(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"alexnet": chain("alexnet").model, "linear": nn.Sequential(nn.Flatten(), nn.Linear(12288, 2))}
    metadata = SimpleNamespace(data=SimpleNamespace(image_size=64))
    monkeypatch.setattr(
        "benchmarks.figures.load_run", lambda name: SimpleNamespace(model=models[name], metadata=metadata)
    )
    assert draw_first_layers({"one": "alexnet"}).axes[0].images
    with pytest.raises(UserError, match="linear: the network has no convolution"):
        draw_first_layers({"one": "linear"})


def test_a_run_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="run=/nowhere: there is no run"):
        main(["--runs", "a=/nowhere"])


def test_a_run_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--runs", "nowhere"])
    assert "--runs nowhere: give a name and a directory" in capsys.readouterr().err
