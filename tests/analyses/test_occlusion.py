"""Compare occlusion with a simple loop, a closed form, and the known boxes of the objects."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.explain.networks import network, random_inputs
from tests.explain.trained import Trained
from tests.helpers import read_csv
from zfnet.analyses.occlusion import Occlusion, Outputs, box_evidence, occlude, probability_falls, square_starts
from zfnet.config.errors import UserError
from zfnet.model.chain import OUTPUT, Chain
from zfnet.runs.directory import RunDirectory

FILL = torch.tensor([0.3, -0.2, 0.1])


def test_occlude_equals_a_plain_loop() -> None:
    model = network("no_pool").chain
    images, labels = random_inputs(model), torch.tensor([1, 3])
    result = occlude(model, images, labels, layer="conv5", patch=12, stride=9, fill=FILL, batch_size=7)
    starts, strongest = result.starts.tolist(), result.strongest
    assert starts == [-3, 6, 15, 24]
    assert strongest is not None
    for n, image in enumerate(images):
        maps = model.activations(image[None], ["conv5"])["conv5"][0]
        channel = int(maps.sum((1, 2)).argmax())
        assert channel == strongest.channel[n]
        assert maps[channel].max() == maps[channel, strongest.peak[n, 0], strongest.peak[n, 1]]
        torch.testing.assert_close(strongest.whole[n], maps[channel].sum())
        for y, top in enumerate(starts):
            for x, left in enumerate(starts):
                hidden = image.clone()
                hidden[:, max(0, top) : top + 12, max(0, left) : left + 12] = FILL[:, None, None]
                answer = model.activations(hidden[None], ["conv5", "fc8"])
                chances = answer["fc8"][0].softmax(0)
                torch.testing.assert_close(result.occluded.probability[n, y, x], chances[labels[n]])
                torch.testing.assert_close(result.occluded.confidence[n, y, x], chances.max())
                assert result.occluded.predicted[n, y, x] == chances.argmax()
                torch.testing.assert_close(strongest.occluded[n, y, x], answer["conv5"][0, channel].sum())


class Linear2(Chain):
    """A linear network with one map, w·x, and two classes: the logit of class 1 is ⟨w, x⟩, that of class 0 is 0."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def activations(self, images: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
        products = (images * self.weight).sum(1, keepdim=True)
        score = products.sum((1, 2, 3))
        result = {"conv5": products, OUTPUT: torch.stack([torch.zeros_like(score), score], 1)}
        return {layer: result[layer] for layer in layers}


def test_occlude_of_a_linear_network_drops_by_the_hidden_products() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, image = (torch.randn(3, 12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    result = occlude(
        Linear2(0.1 * weight), image[None], torch.tensor([1]), layer="conv5", patch=4, stride=4, fill=FILL, batch_size=5
    )
    change = 0.1 * weight * (image - FILL[:, None, None].double())
    expected = change.unfold(1, 4, 4).unfold(2, 4, 4).sum((0, 3, 4))
    assert result.strongest is not None
    torch.testing.assert_close(result.strongest.whole[0] - result.strongest.occluded[0], expected)
    torch.testing.assert_close(result.whole.probability.logit() - result.occluded.probability[0].logit(), expected)


def test_occlude_takes_any_module_and_gives_the_same_probabilities() -> None:
    model = network("no_pool")
    images, labels = random_inputs(model.chain, 3), torch.tensor([0, 1, 2])
    settings = {"patch": 9, "stride": 6, "fill": FILL, "batch_size": 5}
    result, other = (
        occlude(m, images, labels, layer=k, **settings) for m, k in ((model, None), (model.chain, "conv5"))
    )
    assert result.strongest is None
    for ours, theirs in zip(result.occluded + result.whole, other.occluded + other.whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_occlude_labels_agree_with_probabilities() -> None:
    model = network("no_pool").chain
    images, labels = random_inputs(model, 3), torch.tensor([0, 1, 2])
    result = occlude(model, images, labels, layer="conv5", patch=9, stride=4, fill=FILL, batch_size=64)
    named = result.occluded.predicted == labels[:, None, None]
    assert torch.equal(result.occluded.confidence[named], result.occluded.probability[named])
    assert (result.occluded.confidence[~named] > result.occluded.probability[~named]).all()
    assert (result.occluded.confidence >= 1 / 4).all()


@given(st.integers(2, 70), st.data())
def test_square_starts_cover_every_pixel_evenly(size: int, data: st.DataObject) -> None:
    patch = data.draw(st.integers(1, size - 1))
    stride = data.draw(st.integers(1, patch))
    starts = square_starts(size, patch, stride).tolist()
    assert len(starts) == math.ceil(size / stride)
    covered = {p for s in starts for p in range(s, s + patch)}
    assert set(range(size)) <= covered
    before, after = -starts[0], starts[-1] + patch - size
    assert 0 <= after - before <= 1


@pytest.mark.parametrize(
    ("patch", "stride", "message"),
    [(16, 4, "job.patch=16: the occluder must be smaller than the image, which is 16 px"), (4, 5, "job.stride=5")],
)
def test_square_starts_refuses_squares_that_hide_all_or_leave_gaps(patch: int, stride: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        square_starts(16, patch, stride)


def test_occlude_of_a_trained_network_finds_the_object(trained: Trained) -> None:
    """The probability falls more inside the object's box than inside the boxes of other images."""
    images, labels, boxes = trained.correctly_classified(40)  # half as many fail by chance on some processors
    result = occlude(
        trained.model.chain, images, labels, layer="conv5", patch=16, stride=8, fill=torch.zeros(3), batch_size=256
    )

    evidence = box_evidence(result, boxes)
    for measure in ("lowest_in_the_box", "probability_outside_minus_inside"):
        assert evidence[measure]["difference"]["low"] > 0
        assert evidence[measure]["own"]["n"] == 40
    # objects are central, so other images' boxes contain the lowest place more often than by their area
    assert evidence["lowest_in_the_box"]["others"]["mean"] > 1.2 * evidence["share_of_places_in_the_box"]


def test_box_evidence_is_none_where_the_place_is_the_same_in_all_images() -> None:
    """The lowest place and most boxes are always in the middle, which says nothing about an image's own object."""
    starts, boxes = torch.arange(0, 60, 6), torch.tensor([[20.0, 20, 40, 40], [22, 18, 42, 38], [0, 0, 12, 12]])
    probability = torch.ones(3, 10, 10)
    probability[:, 4, 4] = 0.1
    outputs = Outputs(probability, probability.long(), probability)
    evidence = box_evidence(Occlusion(starts, 12, outputs, outputs, None), boxes)
    lowest = evidence["lowest_in_the_box"]
    assert lowest["own"]["mean"] == pytest.approx(2 / 3)
    assert lowest["others"]["mean"] == pytest.approx(2 / 3)  # the same share of the other boxes
    assert lowest["difference"]["low"] <= 0 <= lowest["difference"]["high"]
    assert evidence["share_of_places_in_the_box"] < 0.15


def test_falls_at_the_lowest_place_are_those_of_a_closed_form() -> None:
    """Each image has one bright block. The logits of the two classes are 0 and the sum over the image."""
    images, labels = torch.zeros(3, 3, 12, 12), torch.tensor([1, 1, 1])
    for number, (y, x) in enumerate([(0, 0), (4, 8), (8, 4)]):
        images[number, :, y : y + 4, x : x + 4] = 1 / 48
    black, settings = torch.zeros(3), {"layer": None, "patch": 4, "stride": 4, "batch_size": 4}

    def network(inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.zeros(len(inputs)), inputs.sum((1, 2, 3))], 1)

    result = occlude(network, images, labels, fill=black, **settings)
    falls = probability_falls(network, images, labels, result, torch.full((3,), -1 / 48), 2)  # sums 1 - 2, 1 - 1
    own, others = (1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(-left)) for left in (-1, 0))
    expected = torch.full((3, 3), others, dtype=torch.float64).fill_diagonal_(own)
    torch.testing.assert_close(falls, expected, atol=1e-6, rtol=0)

    blank = torch.zeros_like(images)  # without an object the lowest place is arbitrary
    result = occlude(network, blank, labels, fill=black, **settings)
    falls = probability_falls(network, blank, labels, result, torch.ones(3), 2)
    assert torch.equal(falls, falls[:1, :1].expand(3, 3))


@pytest.mark.drawn
def test_occlusion_of_image_files(run_py, tiny_run: RunDirectory, tmp_path: Path) -> None:
    picture = tmp_path / "a, b.png"  # a comma, which a CSV file must quote
    Image.new("RGB", (50, 80), "red").save(picture)
    answer = run_py(
        "job=occlusion", f"run={tiny_run.folder}", f"images=['{picture}']", "job.patch=30", "job.stride=30",
        "hydra.run.dir=out", "trainer.threads=1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    metadata = json.loads(Path("out/occlusion.json").read_text())
    rows = read_csv(Path("out/maps.csv"))
    assert len(rows) == 9
    assert metadata["images"][0]["class_is_the_truth"] is False
    assert metadata["images"][0]["lowest_probability"] == min(float(r["probability"]) for r in rows)
    assert "a, b.png" in rows[0]["image"]
    assert "boxes" not in metadata
    assert metadata["control"]["own"]["n"] == 1
    assert metadata["images"][0]["control"]["others"] is None
    assert "a square of another colour" not in answer.out  # the control needs other images
    assert Image.open("out/figures/occlusion.png").width > 1000
    assert RunDirectory("out").state == "done"
