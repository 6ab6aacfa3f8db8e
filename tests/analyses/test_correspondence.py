"""Compare Δ and κ with brute force and known cases, and test p with untrained networks, which know no parts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.explain.networks import network, random_inputs
from tests.helpers import TINY, compose, read_csv
from zfnet.analyses.correspondence import (
    MARGIN,
    MarkedImages,
    Masks,
    agreement,
    disagreement,
    draw_correspondence,
    mark_quarters,
    mask,
    measure,
    read_points,
    sign_changes,
    to_input_pixels,
)
from zfnet.config.errors import UserError
from zfnet.model.chain import Chain
from zfnet.runs.directory import RunDirectory


def random_signs(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 15), st.integers(0, 999))
def test_disagreement_is_the_hamming_distance_of_three_valued_signs(rows: int, columns: int, seed: int) -> None:
    signs = random_signs(rows, columns, seed)
    result, chance = disagreement(signs)
    assert torch.equal(result, result.T)
    for i, j in itertools.product(range(rows), repeat=2):
        one, other = signs[i].tolist(), signs[j].tolist()
        expected = sum(a != b for a, b in zip(one, other, strict=True)) / columns
        assert float(result[i, j]) == pytest.approx(expected, abs=1e-6)
        every = sum(a != b for a, b in itertools.product(one, other)) / columns**2
        assert float(chance[i, j]) == pytest.approx(every, abs=1e-6)


def test_agreement_delta_is_the_mean_over_pairs_of_one_class() -> None:
    signs = random_signs(5, 30, 1)
    result = agreement(signs, torch.tensor([0, 1, 0, 1, 0]))
    shares = torch.tensor([(signs[i] != signs[j]).float().mean() for i, j in [(0, 2), (0, 4), (2, 4), (1, 3)]])
    assert result.pairs == 4
    assert result.delta == pytest.approx(float(shares.mean()), abs=1e-6)
    assert result.std == pytest.approx(float(shares.std(correction=1)), abs=1e-6)
    assert result.changed == pytest.approx(float((signs != 0).float().mean()))
    assert agreement(signs[:2], torch.tensor([0, 0])).std is None  # one pair


def test_agreement_kappa_does_not_take_few_changes_for_equal_ones() -> None:
    """For independent changes of 5 % and of 20 % of the features, Δ differs threefold, but κ is 0 both times."""
    groups, generator = torch.zeros(20, dtype=torch.int64), torch.Generator().manual_seed(0)
    few, many = (
        agreement(random_signs(20, 3000, k) * (torch.rand(20, 3000, generator=generator) < share), groups)
        for k, share in ((0, 0.075), (1, 0.3))
    )
    assert (few.changed, many.changed) == pytest.approx((0.05, 0.2), abs=0.01)
    assert many.delta > 3 * few.delta
    assert few.kappa == pytest.approx(0, abs=0.01)
    assert many.kappa == pytest.approx(0, abs=0.01)
    equal = agreement(random_signs(1, 200, 3).expand(12, -1), groups[:12])
    assert (equal.delta, equal.std, equal.kappa) == pytest.approx((0, 0, 1), abs=1e-6)
    assert agreement(torch.zeros(4, 50, dtype=torch.int8), groups[:4]).kappa is None


def test_agreement_refuses_classes_without_pairs() -> None:
    with pytest.raises(UserError, match=r"raise job\.count or choose another job\.split"):
        agreement(random_signs(3, 5, 0), torch.arange(3))


def objects(images: Tensor, **parts: Tensor) -> MarkedImages:
    """Return images with objects in the lower right and these parts, (y, x) in 0 … 1 of the box."""
    count, size = len(images), images.shape[-1]
    box = torch.tensor([[size / 4, size / 4, size, size]]).expand(count, -1)
    marked = MarkedImages(images, {}, box, torch.zeros(count, dtype=torch.int64))
    for name, place in parts.items():
        marked.parts[name] = marked.on_objects(place.expand(1, count, 2))[0]
    return marked


def test_measure_finds_no_parts_in_untrained_networks() -> None:
    """An arbitrary place, the same in all objects, has p ≤ 0.2 in only about a fifth of untrained networks."""
    masks, values, beyond_random = Masks(8, torch.zeros(3), 64), [], 0
    for seed in range(20):
        model = network("no_pool", seed).chain
        place = torch.rand(2, generator=torch.Generator().manual_seed(100 + seed))
        marked = objects(random_inputs(model, 5, seed=seed), anywhere=place)
        table = measure(model, marked, ["conv5"], masks, places=19, seed=seed).table["conv5"]
        values.append(table["anywhere"].p)
        beyond_random += table["anywhere"].delta < table["random"].delta
    assert beyond_random >= 14  # the paper's comparison finds a "correspondence" in most
    assert sum(p <= 0.05 for p in values) <= 3
    assert 1 <= sum(p <= 0.2 for p in values) <= 8
    assert sum(p > 0.5 for p in values) >= 5


def test_measure_finds_no_correspondence_where_the_mask_changes_nothing() -> None:
    model = network("no_pool").chain
    images = random_inputs(model, 6)
    images[..., 8:16, 8:16] = 0  # the object's upper left already has the colour of the fill
    marked = objects(images, blank=torch.tensor([4.5, 4.5]) / 24, other=torch.tensor([0.6, 0.6]))
    result = measure(model, marked, ["conv5", "fc7"], Masks(8, torch.zeros(3), 64), places=19, seed=0)
    for rows in result.table.values():
        assert (rows["blank"].delta, rows["blank"].kappa, rows["blank"].p, rows["blank"].p_holm) == (0, None, 1, 1)
        assert rows["other"].changed > 0.1
        assert 4 * rows["other"].p >= rows["other"].p_holm >= rows["other"].p  # two parts in two layers
        assert list(rows) == ["blank", "other", "same place", "random"]
    draw_correspondence(result, {row: torch.zeros(2, 8, 8, 3, dtype=torch.uint8) for row in result.centres})


class Reddish(Chain):
    """Features that depend on every pixel, and on the total amount of red at any position."""

    def __init__(self) -> None:
        self.weight = torch.randn(3 * 32 * 32, 80, generator=torch.Generator().manual_seed(0))

    def activations(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        return {"fc7": images.flatten(1) @ self.weight + 10 * images[:, 0].sum((1, 2))[:, None] * self.weight[0]}


def test_measure_ranks_first_the_part_that_features_know() -> None:
    """Each object has its red part at another place, so that a same place hides it in few objects."""
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images[:, 0] *= 0.01
    marked = objects(images, elsewhere=torch.tensor([0.3, 0.6]))
    marked.parts["red"] = marked.on_objects(torch.rand(1, 10, 2, generator=torch.Generator().manual_seed(2)))[0]
    for image, (y, x) in zip(images, marked.parts["red"].round().int().tolist(), strict=True):
        image[0, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] = 1
    rows = measure(Reddish(), marked, ["fc7"], Masks(8, torch.zeros(3), 64), places=199, seed=0).table["fc7"]
    assert rows["red"].p == 1 / 200
    assert rows["red"].p_holm == 2 / 200
    assert rows["elsewhere"].p > 0.05


def test_measure_centres_random_masks_on_the_object() -> None:
    model = network("no_pool").chain
    marked = objects(random_inputs(model, 30))
    result = measure(model, marked, ["fc7"], Masks(8, torch.zeros(3), 64), places=3, seed=0)
    assert result.centres["random"].min() >= 8 - 0.5
    assert len(result.centres["random"].unique(dim=0)) == 30
    assert len(result.centres["same place"].unique(dim=0)) == 1


def test_mask_hides_a_square_around_each_centre() -> None:
    images = torch.randn(2, 3, 12, 12)
    fill = torch.tensor([1.0, 2, 3])
    hidden = mask(images, torch.tensor([[4.5, 6.5], [0.0, 11.0]]), 4, fill)
    expected = images.clone()
    expected[0, :, 3:7, 5:9] = fill[:, None, None]
    changed = (hidden != images).any(1)
    assert changed[0].nonzero().tolist() == [[y, x] for y in range(3, 7) for x in range(5, 9)]
    torch.testing.assert_close(hidden[0], expected[0])
    assert changed[1].nonzero().amin(0).tolist() in ([0, 9], [0, 10])  # part of the square is outside the image
    assert changed[1, 0, 11]


def test_sign_changes_are_those_of_the_features() -> None:
    model = network("no_pool").chain
    images, masks = random_inputs(model, 3), Masks(6, torch.zeros(3), 6)
    centres = torch.tensor([[[8.0, 8], [16, 16], [24, 9]], [[-50.0, 0], [-50, 0], [-50, 0]]])
    result = sign_changes(model, images, centres, masks, ["conv1", "fc6"])
    hidden = mask(images, centres[0], masks.patch, masks.fill)
    before, after = (model.activations(x, ["conv1", "fc6"]) for x in (images, hidden))
    for layer, signs in result.items():
        expected = (before[layer] - after[layer]).flatten(1).sign()
        assert (signs[0] == expected).float().mean() > 0.999
        assert (signs[1] == 0).all()  # this mask is outside the image
    far = result["conv1"][0].view(3, 5, 32, 32)[0, :, 20:, 20:]  # beyond the reach of the mask
    assert (far == 0).all()


def test_mark_quarters_cuts_to_the_box() -> None:
    image = torch.zeros(1, 3, 40, 40)
    box = torch.tensor([[10.0, 4.0, 20.0, 14.0]])
    image[0, 0, 10:20, 4:14] = 1
    image[0, 1, 10:15, 9:14] = 1  # the upper right quarter
    marked = mark_quarters(image, box, torch.zeros(1, dtype=torch.int64))
    cut = marked.inputs
    filled = (cut[0, 0] > 0.5).nonzero()
    low, high = 20 - 20 / MARGIN, 20 + 20 / MARGIN
    assert (filled.amin(0) - low).abs().max() <= 1
    assert (filled.amax(0) + 1 - high).abs().max() <= 1
    assert marked.boxes[0].tolist() == pytest.approx([low, low, high, high])
    for name, centre in marked.parts.items():
        y, x = centre[0].round().int().tolist()
        assert (cut[0, 1, y, x] > 0.5) == (name == "upper right"), name


@pytest.mark.drawn
def test_correspondence_of_shapes_and_of_a_table_of_points(run_py, tiny_run: RunDirectory, tmp_path: Path) -> None:
    words = ("job=correspondence", f"run={tiny_run.folder}", "job.places=99", "trainer.threads=1")
    answer = run_py(*words, "job.split=test", "job.count=12", "hydra.run.dir=out")
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/correspondence.csv"))
    assert [r["part"] for r in rows] == [
        *(f"{v} {h}" for v in ("upper", "lower") for h in ("left", "right")),
        "same place",
        "random",
    ] * 2
    assert {r["layer"] for r in rows} == {"conv5", "fc7"}
    assert all((row["p"] == "") == (row["part"] in ("same place", "random")) for row in rows)
    assert len(read_csv(Path("out/same_places.csv"))) == 2 * 99
    assert Image.open("out/figures/correspondence.png").width > 500

    for name, size in (("a.png", (80, 60)), ("b.png", (64, 64))):
        Image.effect_noise(size, 90).save(tmp_path / name)
    table = tmp_path / "points.csv"
    table.write_text("image,part,x,y\na.png,eye,40,20\na.png,nose,50,40\nb.png,eye,30,20\nb.png,nose,31,45\n")
    answer = run_py(*words, f"job.points={table}", "hydra.run.dir=own")
    assert answer.code == 0, answer.err
    metadata = json.loads(Path("own/correspondence.json").read_text())
    assert list(metadata["table"]["fc7"]) == ["eye", "nose", "same place", "random"]
    assert metadata["images"] == 2


# ---- tables of points

DATA = compose(*TINY).data


@pytest.fixture
def loaded() -> Any:
    """The attributes of a run that the functions use: its preprocessing and its device."""
    runtime = SimpleNamespace(device=torch.device("cpu"), channels_last=True)
    return SimpleNamespace(metadata=SimpleNamespace(stored_size=64), data=DATA, runtime=runtime)


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path) -> None:
    dot = Image.new("RGB", (120, 80))
    dot.paste("white", (70, 20, 80, 30))
    dot.save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")


def test_read_points_follow_their_pixels_into_the_network(loaded: Any, tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    table.write_text("image,part,x,y,left,top,right,bottom\na.png,dot,75,25,70,20,80,30\nb.png,dot,1,62,-9,40,30,64\n")
    result = read_points(loaded, table)
    assert result.boxes.tolist() == [pytest.approx([16, 40, 24, 48]), [40, 0, 64, 30]]
    y, x = result.parts["dot"][0].tolist()
    assert (x, y) == pytest.approx((43.5, 19.5))  # 20 px are cropped on the left, then the scale is 0.8; 0 is a centre
    lit = (result.inputs[0, 0] > 0).nonzero().float()
    assert lit.mean(0).tolist() == pytest.approx([y, x], abs=0.6)
    assert result.parts["dot"][1].tolist() == [61.5, 0.5]
    # the same spot as a place of the object's box, and hidden exactly
    torch.testing.assert_close(result.on_objects(torch.tensor([[[0.5, 0.5]]]))[0][0], result.parts["dot"][0])
    hidden = mask(torch.ones(1, 3, 64, 64), result.parts["dot"][:1], 8, torch.zeros(3))[0, 0] == 0
    assert (hidden.nonzero().min(0).values.tolist(), hidden.sum()) == ([16, 40], 64)
    stretched = replace(DATA, fit="stretch", crop_size=32)
    assert to_input_pixels((60, 40), (120, 80), 64, stretched) == (32, 32)
    assert to_input_pixels((30, 40), (120, 80), 64, stretched) == (32, 0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["image,part,x"], "has no column y"),
        (["x,y,part,image", "20,20,head"], "points.csv, line 2: has no image; it needs image, part, x, y"),
        (["x,y,image,part", "20,20,a.png"], "points.csv, line 2: has no part"),
        (["image,part,x,y", "a.png,eye,1"], "points.csv, line 2: has no y"),
        (["image,part,x,y", "a.png,eye,1,b"], "line 2: x=1, y=b are not numbers"),
        (["image,part,x,y", "a.png,eye,1,nan", "b.png,eye,1,1"], "eye of a.png is outside"),
        (["image,part,x,y", "a.png,eye,1,1", "a.png,eye,1,1"], "line 3: eye of a.png is already listed"),
        (["image,part,x,y", "a.png,eye,60,1", "b.png,nose,30,1"], "image a.png has no nose"),
        (["image,part,x,y", "a.png,random,60,1"], "line 2: part=random: is the name of a control; rename the part"),
        (["image,part,x,y", "a.png,eye,1,1", "b.png,eye,1,1"], "eye of a.png is outside the area of the image"),
        (["image,part,x,y", "a.png,eye,60,1"], "names 1 images"),
        (["image,part,x,y", "a.png,eye,60,1", "b.png,eye,9,1"], "a.png has no box: give the object's in the columns"),
        (
            ["image,part,x,y,left,top,right,bottom", "a.png,eye,60,1,9,9,1,1", "b.png,eye,9,1,0,0,9,9"],
            "a.png has no box",
        ),
        (["image,part,x,y", "c.png,eye,60,1", "a.png,eye,30,1"], "c.png cannot be read as an image"),
    ],
)
def test_read_points_names_what_is_wrong_with_a_table(
    loaded: Any, tmp_path: Path, lines: list[str], expected: str
) -> None:
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        read_points(loaded, tmp_path / "points.csv")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
