"""Δ against brute force, closed cases, and the permutation test against data where the answer is known."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tests.explain.networks import network, pictures
from tests.explain.trained import read_csv
from tests.helpers import TINY, compose
from zfnet.analyses.correspondence import (
    MARGIN,
    compare,
    cut_to_boxes,
    disagreement,
    mask,
    quarter_centres,
    read_points,
    sign_changes,
    to_input_pixels,
)
from zfnet.config.errors import UserError
from zfnet.runs.directory import RunDirectory


def random_signs(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 999))
def test_disagreement_is_the_hamming_distance_of_three_valued_signs(rows: int, columns: int, seed: int) -> None:
    signs = random_signs(rows, columns, seed)
    result = disagreement(signs)
    assert torch.equal(result, result.T)
    for i, j in itertools.product(range(rows), repeat=2):
        expected = sum(a != b for a, b in zip(signs[i].tolist(), signs[j].tolist(), strict=True)) / columns
        assert float(result[i, j]) == pytest.approx(expected, abs=1e-6)


def test_compare_delta_is_the_mean_over_pairs_of_one_class() -> None:
    part, place = random_signs(5, 30, 1), random_signs(5, 30, 2)
    groups = torch.tensor([0, 1, 0, 1, 0])
    pairs = [(0, 2), (0, 4), (2, 4), (1, 3)]
    own, at_random = compare(part, place, groups, permutations=10, seed=0)
    for result, signs in ((own, part), (at_random, place)):
        shares = torch.tensor([(signs[i] != signs[j]).float().mean() for i, j in pairs])
        assert result.pairs == 4
        assert result.delta == pytest.approx(float(shares.mean()), abs=1e-6)
        assert result.spread == pytest.approx(float(shares.std(correction=0)), abs=1e-6)
    assert own.random_delta == at_random.delta


def test_compare_equal_changes_have_delta_0_and_a_small_p() -> None:
    same = random_signs(1, 200, 3).expand(12, -1)
    place = random_signs(12, 200, 4)
    groups = torch.zeros(12, dtype=torch.int64)
    own, at_random = compare(same, place, groups, permutations=500, seed=0)
    assert own.delta == own.spread == 0
    assert at_random.delta == pytest.approx(2 / 3, abs=0.05)
    assert own.p is not None
    assert own.p <= 2 / 501


def test_compare_p_is_uniform_where_parts_are_random_places() -> None:
    groups = torch.zeros(8, dtype=torch.int64)
    result = [
        compare(random_signs(8, 60, 2 * k), random_signs(8, 60, 2 * k + 1), groups, 99, seed=k)[0].p for k in range(60)
    ]
    values = torch.tensor(result)
    assert 0.35 < float(values.mean()) < 0.65
    assert float((values <= 0.2).float().mean()) < 0.4


def test_compare_refuses_classes_without_pairs() -> None:
    with pytest.raises(UserError, match="no two images of one class"):
        compare(random_signs(3, 5, 0), random_signs(3, 5, 1), torch.arange(3), 10, 0)


def test_mask_hides_a_square_around_each_centre() -> None:
    images = torch.randn(2, 3, 12, 12)
    fill = torch.tensor([1.0, 2, 3])
    hidden = mask(images, torch.tensor([[4.5, 6.5], [0.0, 11.0]]), 4, fill)
    expected = images.clone()
    expected[0, :, 3:7, 5:9] = fill[:, None, None]
    changed = (hidden != images).any(1)
    assert changed[0].nonzero().tolist() == [[y, x] for y in range(3, 7) for x in range(5, 9)]
    torch.testing.assert_close(hidden[0], expected[0])
    assert changed[1].nonzero().amin(0).tolist() in ([0, 9], [0, 10])  # the rest lies outside the image
    assert changed[1, 0, 11]


def test_sign_changes_are_those_of_the_features() -> None:
    model = network("no_pool").chain
    images = pictures(model, 3)
    hidden = mask(images, torch.tensor([[8.0, 8], [16, 16], [24, 9]]), 6, torch.zeros(3))
    result = sign_changes(model, images, hidden, ["conv1", "fc6"], batch_size=2)
    before, after = (model.activations(x, ["conv1", "fc6"]) for x in (images, hidden))
    for layer, signs in result.items():
        expected = (before[layer] - after[layer]).flatten(1).sign()
        assert (signs == expected).float().mean() > 0.999
    far = result["conv1"].view(3, 5, 32, 32)[0, :, 20:, 20:]  # beyond the reach of the mask
    assert (far == 0).all()
    none = sign_changes(model, images, images, ["fc6"], batch_size=2)["fc6"]
    assert (none == 0).all()


def test_cut_to_boxes_and_quarter_centres() -> None:
    image = torch.zeros(1, 3, 40, 40)
    box = torch.tensor([[10.0, 4.0, 20.0, 14.0]])
    image[0, 0, 10:20, 4:14] = 1
    image[0, 1, 10:15, 9:14] = 1  # the upper right quarter
    cut = cut_to_boxes(image, box)
    filled = (cut[0, 0] > 0.5).nonzero()
    low, high = 20 - 20 / MARGIN, 20 + 20 / MARGIN
    assert (filled.amin(0) - low).abs().max() <= 1
    assert (filled.amax(0) + 1 - high).abs().max() <= 1
    centres = quarter_centres(box, 40)
    for name, centre in centres.items():
        y, x = centre[0].round().int().tolist()
        assert (cut[0, 1, y, x] > 0.5) == (name == "upper right"), name


def test_correspondence_of_shapes_and_of_a_table_of_points(run_py, tiny_run: RunDirectory, tmp_path: Path) -> None:
    words = ("job=correspondence", f"run={tiny_run.folder}", "job.permutations=20", "trainer.threads=1")
    answer = run_py(*words, "job.split=test", "job.count=30", "hydra.run.dir=out")
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/correspondence.csv"))
    assert [r["part"] for r in rows] == [
        *(f"{v} {h}" for v in ("upper", "lower") for h in ("left", "right")),
        "same place",
        "random",
    ] * 2
    assert {r["layer"] for r in rows} == {"conv5", "fc7"}
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
    """What is asked of a run: its preprocessing and its device."""
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
    table.write_text("image,part,x,y\na.png,dot,75,25\nb.png,dot,1,62\n")
    result = read_points(loaded, table)
    y, x = result.parts["dot"][0].tolist()
    assert (x, y) == pytest.approx((44, 20))  # 20 px are cut off on the left, the rest is 0.8 as large
    lit = (result.inputs[0, 0] > 0).nonzero().float() + 0.5
    assert lit.mean(0).tolist() == pytest.approx([y, x], abs=0.6)
    assert result.parts["dot"][1].tolist() == [62, 1]
    stretched = replace(DATA, fit="stretch", crop_size=32)
    assert to_input_pixels((60, 40), (120, 80), 64, stretched) == (32, 32)
    assert to_input_pixels((30, 40), (120, 80), 64, stretched) == (32, 0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["image,part,x"], "lacks the column y"),
        (["image,part,x,y", "a.png,eye,1,b"], "line 2: x=1, y=b are not numbers"),
        (["image,part,x,y", "a.png,eye,1,nan", "b.png,eye,1,1"], "eye of a.png lies outside"),
        (["image,part,x,y", "a.png,eye,1,1", "a.png,eye,1,1"], "line 3: eye of a.png is there already"),
        (["image,part,x,y", "a.png,eye,60,1", "b.png,nose,30,1"], "image a.png has no nose"),
        (["image,part,x,y", "a.png,eye,1,1", "b.png,eye,1,1"], "eye of a.png lies outside what the network sees"),
        (["image,part,x,y", "a.png,eye,60,1"], "names 1 images"),
        (["image,part,x,y", "a.png,eye,60,1", "c.png,eye,30,1"], "c.png cannot be read as an image"),
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
