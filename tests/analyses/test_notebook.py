"""The analyses from Python: they return the numbers of the commands as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import load_for_job
from zfnet import load_run
from zfnet.analyses.notebook import occlusion, projections, top_activations
from zfnet.config.errors import UserError
from zfnet.data.shapes import draw_shapes
from zfnet.explain import Deconvnet
from zfnet.jobs.predict import predict
from zfnet.runs.weights import TrainedRun


@pytest.fixture(scope="module")
def run(tiny_run) -> TrainedRun:
    return load_run(tiny_run.folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "tall [1].png"
    Image.fromarray(draw_shapes(1, 64, part=1).images[0]).resize((80, 120)).save(path)
    return path


def test_predict_is_what_job_predict_says(run: TrainedRun, photo: Path, tiny_run) -> None:
    (expected,) = predict(load_for_job(tiny_run), [str(photo)], top=10, batch_size=1)
    run.model.train()  # predict switches dropout off
    assert list(run.predict(photo).items()) == [(name, pytest.approx(p, abs=1e-6)) for name, p in expected.best]
    assert next(iter(run.predict(photo))) == expected.best[0][0]


@pytest.mark.parametrize(("name", "problem"), [("gone.png", "no such file"), ("", "names 2 images"), ("x", "format")])
def test_predict_names_the_image_that_it_cannot_read(run: TrainedRun, photo: Path, name: str, problem: str) -> None:
    (photo.parent / "x").write_text("no image")
    Image.new("RGB", (8, 8)).save(photo.parent / "other.png")
    with pytest.raises(UserError, match=problem) as error:
        run.predict(photo.parent / name)
    assert str(photo.parent / name) in str(error.value)


def test_predict_takes_the_pixels_of_an_image(run: TrainedRun, photo: Path) -> None:
    image = Image.open(photo)
    pixels = np.array(image)
    for form in (image, pixels, torch.from_numpy(pixels).permute(2, 0, 1)):
        assert run.predict(form) == run.predict(photo)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (np.zeros((8, 8, 3)), "a ndarray cannot be read as an image (pixels are float64"),
        (torch.zeros(1, 3, 64, 64), "a Tensor cannot be read as an image ("),
        (torch.randn(3, 64, 64), "a Tensor cannot be read as an image (pixels are floats from -"),
        (7, "a int cannot be read as an image (pixels are int64"),
        (None, "a NoneType cannot be read as an image (pixels are object"),
        ("long" * 999, "cannot be read as an image ("),
    ],
)
def test_predict_names_what_is_no_image(run: TrainedRun, image: object, problem: str) -> None:
    with pytest.raises(UserError) as error:
        run.predict(image)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_repr_is_one_short_line(run: TrainedRun, tiny_run) -> None:
    accuracy = tiny_run.read_json("results.json")["validation"]["accuracy"]
    assert repr(run) == f"<{tiny_run.folder}: small on shapes, 10 classes, validation {accuracy:.2%}>"


def test_occlusion_hides_where_it_says(run: TrainedRun, photo: Path) -> None:
    maps = occlusion(run, photo, patch=16, stride=16)
    assert (maps.label, maps.whole) == pytest.approx(next(iter(run.predict(photo).items())))
    assert maps.picture.shape == (64, 64, 3)
    assert maps.centres.tolist() == [8, 24, 40, 56]
    inputs = run.inputs(photo)
    inputs[:, :, 32:48, 0:16] = 0  # place (2, 0), in the mean colour
    with torch.no_grad():
        hidden = run.model(inputs).softmax(1)[0]
    assert maps.probability[2, 0] == pytest.approx(float(hidden[run.classes.index(maps.label)]), abs=1e-6)
    assert maps.predicted[2, 0] == run.classes[int(hidden.argmax())]
    assert maps.activation.shape == maps.probability.shape == (4, 4)
    assert occlusion(run, photo, label=run.classes[3], patch=32, stride=32).label == run.classes[3]
    for words in ({"patch": 0}, {"stride": -1}):
        with pytest.raises(UserError, match="must be at least 1"):
            occlusion(run, photo, **words)


@torch.no_grad()
def test_projections_show_the_strongest_unit_of_each_map(run: TrainedRun, photo: Path) -> None:
    shown = projections(run, photo, "conv3", maps=4)
    maps = run.model.activations(run.inputs(photo), ["conv3"])["conv3"][0]
    assert shown.activations.tolist() == pytest.approx(maps.amax((1, 2)).topk(4).values.tolist())
    for (_, channel, y, x), value in zip(shown.units, shown.activations, strict=True):
        assert float(maps[channel, y, x]) == pytest.approx(value)
    expected = Deconvnet(run.model).project(run.inputs(photo), "conv3", shown.units.tolist()).permute(0, 2, 3, 1)
    np.testing.assert_allclose(shown.values, expected.numpy(), atol=1e-6)
    assert shown.pictures.dtype == np.uint8
    assert shown.pictures.shape == (4, 64, 64, 3)
    assert np.abs(shown.pictures.astype(int) - 128).max((1, 2, 3)).min() > 100  # each has its own scale
    assert projections(run, photo, "conv3", maps=[5]).units[0, 1] == 5


@torch.no_grad()
def test_top_activations_are_the_largest_of_the_split(run: TrainedRun, tiny_run) -> None:
    shown = top_activations(run, "conv5", maps=3, top=2)
    loaded = load_for_job(tiny_run)
    images = loaded.split("validation")
    inputs = next(loaded.batches(images).in_order()).images
    peaks = run.model.activations(inputs, ["conv5"])["conv5"].amax((2, 3))
    assert len(inputs) == len(images)
    best = peaks.topk(2, dim=0)
    assert shown.images.tolist() == best.indices.T[:3].tolist()
    np.testing.assert_allclose(shown.activations, best.values.T[:3].numpy(), rtol=1e-5)
    assert shown.projections.shape == shown.patches.shape == (3, 2, *shown.patches.shape[2:])
    assert shown.projections.std() > 1


def test_errors_name_bad_arguments(run: TrainedRun, photo: Path) -> None:
    for call, words in (
        (lambda: occlusion(run, photo, label="discs"), "label=discs: no such class; did you mean 'disc'"),
        (lambda: occlusion(run, photo, layer="fc7"), "layer=fc7: the network has no such convolution"),
        (lambda: projections(run, photo, "conv9"), "layer=conv9"),
        (lambda: projections(run, photo, "conv1", maps=[999]), "maps=.*999.*0 to 31"),
        (lambda: projections(run, photo, "conv1", maps=[0.5]), "maps=.*0.5.*: must be a number of maps, or"),
        (lambda: projections(run, photo, "conv1", maps=2.0), "maps=2.0: must be a number of maps, or"),
        (lambda: occlusion(run, photo, label=0), "label=0: no such class"),
        (lambda: projections(run, photo, "conv1", maps=-3), "maps=-3: must be a number of maps, or"),
        (lambda: projections(run, photo, "conv1", maps=0), "maps=0: must be a number of maps, or"),
        (lambda: top_activations(run, "conv1", maps=-3), "maps=-3: must be a number of maps, or"),
        *(
            (
                lambda split=split: top_activations(run, "conv1", split=split),
                f"split={split}: the run has no such images",
            )
            for split in ("val", "difference", "fingerprint", "__class__")
        ),
        (lambda: top_activations(run, "conv1", top=0), "top=0: must be at least 1"),
        (lambda: top_activations(run, "conv1", top=-1), "top=-1: must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            call()
