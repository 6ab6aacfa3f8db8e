"""The atlas in a real browser: every map is there, can be found, sorted, opened and followed to its image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.explain.networks import config
from tests.helpers import compose
from tests.plots.browser import CHROMIUM, DRIVER, browser
from zfnet.config.schema import Conv
from zfnet.data import Batches
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet, receptive_box
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.zfnet import ZFNet
from zfnet.plots.atlas import Atlas, write_atlas

CLASSES = ["<b>bold</b>", "</script>", "sea lion", "cat"]
MAPS = 12 + 6


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """conv1 and conv5 of a random network; map 3 of conv1 is dead, and class names are hostile."""
    torch.manual_seed(0)
    model = ZFNet(4, 64, config(conv1=Conv(12, 7, 2, 1, True), conv5=Conv(6, 3, 1, 1, True))).eval()
    with torch.no_grad():
        model.conv1.weight[3], model.conv1.bias[3] = 0, -1
        model.conv5.bias.add_(0.3)
    data = compose("experiment=quickstart", "data.batch_size=8").data
    pixels = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = image_set(pixels.numpy(), torch.arange(16) % 4, CLASSES)
    result = collect(
        model, images, lambda part: Batches(part, data, torch.device("cpu")), ["conv1", "conv5"], TopActivations(4, 4)
    )
    return Atlas("tiny <net>", "test", Deconvnet(model), images, data, result)


@pytest.fixture(scope="module")
def page(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(atlas, tmp_path_factory.mktemp("atlas"))


def test_atlas_numbers_are_the_searchs(atlas: Atlas, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    metadata = json.loads(re.search(r'id="metadata">(.*?)</script>', text, re.S)[1])
    assert [len(layer["maps"]) for layer in metadata["layers"]] == [12, 6]
    assert metadata["classes"] == CLASSES
    for layer in metadata["layers"]:
        record = atlas.search.layers[layer["name"]]
        for number, entry in enumerate(layer["maps"]):
            assert len(entry["top"]) == int(record.filled[number].sum())
            for rank, (value, image, label, y, x, *box) in enumerate(entry["top"]):
                assert value == pytest.approx(record.values[number, rank].item(), rel=1e-3)
                assert [image, y, x] == record.places()[number, rank].tolist()
                assert label == image % 4
                seen = receptive_box(atlas.deconvnet.model, layer["name"], y, x)
                assert [64 * side for side in box] == pytest.approx(seen, abs=0.05)
    assert metadata["layers"][0]["maps"][3]["top"] == []
    assert not (page.parent / "maps/conv1/3.webp").exists()


def test_atlas_fetches_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|<link(?! rel=\"icon\" href=\"data:,\")|@import", text)
    assert "<b>bold" not in text
    assert text.count("</script>") == 2


def test_atlas_patches_and_images_are_the_sets_own(atlas: Atlas, page: Path) -> None:
    """The lower row of a map's picture shows what the network sees; 7 px frames are stored without loss."""
    record = atlas.search.layers["conv1"]
    n, y, x = record.places()[0, 0].tolist()
    stored = np.array(Image.open(page.parent / f"images/{n}.webp").convert("RGB"))
    assert np.array_equal(stored, atlas.images.images[n])
    whole = np.array(Image.fromarray(stored).resize((64, 64), Image.Resampling.BILINEAR))
    top, left, bottom, right = receptive_box(atlas.deconvnet.model, "conv1", y, x)
    patch = np.full((7, 7, 3), 128, np.uint8)
    high, low = top - (2 * y - 1), left - (2 * x - 1)
    patch[high : high + bottom - top, low : low + right - left] = whole[top:bottom, left:right]
    picture = np.array(Image.open(page.parent / "maps/conv1/0.webp").convert("RGB"))
    assert picture.shape == (14, 28, 3)
    assert np.array_equal(picture[7:, :7], patch)


def test_write_atlas_continues_after_a_stop(atlas: Atlas, page: Path, tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atlas(atlas, tmp_path, stop)
    first = tmp_path / "maps/conv1/0.webp"
    made = first.stat().st_mtime_ns
    write_atlas(atlas, tmp_path)
    assert first.stat().st_mtime_ns == made
    files = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.*"))
    assert files == sorted(p.relative_to(page.parent) for p in page.parent.rglob("*.*"))
    for file in files:
        assert (tmp_path / file).read_bytes() == (page.parent / file).read_bytes()


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_atlas_in_a_browser(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as b:

        def cards() -> list[str]:
            return b.run("return [...document.querySelectorAll('.card')].map((c) => c.dataset.map)")

        def put(name: str, value: str) -> list[str]:
            b.run(
                f"const e = document.getElementById('{name}'); e.value = {json.dumps(value)};"
                "e.dispatchEvent(new Event('input', {bubbles: true}))"
            )
            return cards()

        b.open(page)
        b.wait("document.readyState === 'complete'")
        assert len(cards()) == MAPS
        assert b.run("return document.querySelectorAll('.card.dead').length") == 1
        assert f"{MAPS} of {MAPS} maps, 1 never active" in b.run("return document.getElementById('count').textContent")
        # search: by number, by layer, by class (one with a space, one with markup), and for nothing
        assert put("search", "5") == ["#conv1/5", "#conv5/5"]
        assert put("search", "conv5 5") == ["#conv5/5"]
        assert 0 < len(put("search", "sea lion")) <= MAPS
        assert len(put("search", "<b>bold")) > 0
        assert put("search", "dead") == ["#conv1/3"]
        assert put("search", "zebra") == []
        assert len(put("search", "")) == MAPS
        # sort
        for key, script in {
            "activation": "-(m.dead ? -Infinity : m.top[0][0])",
            "selectivity": "-(m.selectivity - m.chance)",
            "sparsity": "m.dead ? 2 : m.positions",
        }.items():
            shown = put("sort", key)
            values = b.run(f"return state.shown.map((m) => {script})")
            assert len(shown) == MAPS
            values = [float("inf") if v is None else v for v in values]  # JSON has no infinity
            assert values == sorted(values)
        put("sort", "number")
        # a layer alone, and its pictures
        b.run("[...document.querySelectorAll('#layers button')].find((e) => e.value === 'conv5').click()")
        assert cards() == [f"#conv5/{n}" for n in range(6)]
        put("kind", "patches")
        assert "conv5_patches" in b.run("return document.querySelector('.thumbnail').style.backgroundImage")
        # open a map, its image, its neighbours, and close it
        b.run("document.querySelector('.card').click()")
        b.wait("document.getElementById('detail').open")
        assert b.run("return document.querySelectorAll('#tiles li').length") == 4
        b.run("document.querySelectorAll('#tiles button')[1].click()")
        b.wait("document.getElementById('image').complete && document.getElementById('image').naturalWidth === 32")
        b.press("\ue014")  # right arrow
        b.wait("location.hash === '#conv5/1'")
        b.press("\ue00c")  # escape
        b.wait("!document.getElementById('detail').open")
        b.wait("document.activeElement.dataset.map === '#conv5/1'")
        # a dead map, by its address
        b.run("location.hash = '#conv1/3'")
        b.wait("document.getElementById('statistics').textContent.startsWith('Never active')")
        # light and dark
        before = b.run("return getComputedStyle(document.body).backgroundColor")
        b.run("document.getElementById('theme').click()")
        assert b.run("return getComputedStyle(document.body).backgroundColor") != before
        # every picture that was asked for came, and nothing complained
        assert b.run("return document.querySelectorAll('button:not([aria-label]):empty').length") == 0
        assert b.messages() == []
