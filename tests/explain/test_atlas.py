"""The atlas in a real browser: it shows every map, and maps can be searched, sorted and opened with their images."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.explain.browser import CHROMIUM, DRIVER, browser
from tests.explain.networks import config
from tests.helpers import compose
from zfnet.config.errors import UserError
from zfnet.config.schema import Conv
from zfnet.data import Batches
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet, receptive_box
from zfnet.explain.atlas import (
    Atlas,
    Photograph,
    Strongest,
    Verdict,
    _layer_data,
    find_atlas,
    find_verdict,
    link_to,
    write_atlas,
    write_photographs,
    write_single,
)
from zfnet.explain.maps import MapResponses
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.zfnet import ZFNet

CLASSES = ["<b>bold</b>", "</script>", "sea lion", "cat"]
MAPS = {"conv1": 12, "conv5": 6}
ALL = sum(MAPS.values())
SCORES = {("conv1", 0): {"own": (0.8, 0.021, 4)}, ("conv5", 2): {"own": (-0.25, None, 1), "deletion": (1.5, None, 1)}}


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    """An atlas of conv1 and conv5 of a random network. Map 3 of conv1 is dead, and class names contain markup."""
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
    strongest = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    effect = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    responses = {"conv1": MapResponses(strongest, effect), "conv5": MapResponses(strongest[:, :6], effect[:6])}
    nearest = {layer: [[("conv2", n, 0.9 - n / 100)] for n in range(count)] for layer, count in MAPS.items()}
    return Atlas(
        *("tiny <net>", "test", Deconvnet(model), images, data, result),
        weights="abc",
        responses=responses,
        nearest=nearest,
        other={"name": "other <run>", "atlas": "../other/index.html"},
        verdict=Verdict("2026", "validation", SCORES),
    )


@pytest.fixture(scope="module")
def page(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_atlas(atlas, tmp_path_factory.mktemp("atlas"))


def test_atlas_contains_the_numbers_of_the_search(atlas: Atlas, page: Path) -> None:
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
        responses = atlas.responses[layer["name"]]
        for number, entry in enumerate(layer["maps"]):
            assert sum(entry["histogram"]) == 9
            label, change = entry["effect"][0]
            assert change == pytest.approx(responses.effect[number, label].item(), rel=1e-3)
            assert abs(change) == pytest.approx(responses.effect[number].abs().max().item(), rel=1e-3)
            assert entry["scores"] == {k: list(v) for k, v in SCORES.get((layer["name"], number), {}).items()}
            assert entry["nearest"] == [["conv2", number, pytest.approx(0.9 - number / 100)]]
    assert metadata["layers"][0]["maps"][3]["top"] == []
    assert json.loads((page.parent / "atlas.json").read_text()) == metadata
    assert not (page.parent / "maps/conv1/3.webp").exists()


def test_atlas_names_only_classes_that_have_images(atlas: Atlas) -> None:
    """Without a ReLU all means of a map can be below 0, which is the mean of a class without images."""
    search = TopActivations(4, 4)
    search.add({"conv1": -1 - torch.rand(3, 12, 2, 2)}, torch.arange(3), torch.tensor([3, 1, 3]))
    some = dataclasses.replace(atlas, search=search, responses={}, nearest={}, verdict=None)
    best = search.statistics("conv1").best_class.tolist()
    for number, entry in enumerate(_layer_data(some, "conv1", search.layers["conv1"])["maps"]):
        assert [label for label, _ in entry["classes"]] == [best[number], 4 - best[number]]


def test_atlas_fetches_nothing_from_elsewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|<link(?! rel=\"icon\" href=\"data:,\")|@import", text)
    assert "<b>bold" not in text
    assert text.count("</script>") == 2


def test_atlas_patches_and_images_are_the_sets_own(atlas: Atlas, page: Path) -> None:
    """The lower row of a map's picture shows what the network sees. Frames of 7 px are stored losslessly."""
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


def test_photographs_link_to_the_atlas_and_escape_names(tmp_path: Path) -> None:
    tiles = torch.zeros(2, 7, 7, 3, dtype=torch.uint8)
    none = Strongest([], [], tiles[:0], tiles[:0])
    rows = {"conv<1>": Strongest([5, 2], [1.5, 0.25], tiles, tiles + 9), "conv5": none}
    photograph = Photograph("<i>cat</i>.jpg", torch.zeros(64, 64, 3, dtype=torch.uint8), [("</ol>", 0.75)], rows)
    write_photographs(tmp_path / "a.html", [photograph], "<run>", "../atlas/index.html")
    text = (tmp_path / "a.html").read_text()
    assert re.findall(r'<a href="([^"]+)">', text) == [f"../atlas/index.html#conv&lt;1&gt;/{n}" for n in (5, 2)]
    assert "<i>" not in text
    assert text.count("</ol>") == 1
    assert "no map is active" in text
    assert not re.search(r"https?:|//\w|<script", text)
    write_photographs(tmp_path / "b.html", [photograph], "run", None)
    assert "<a href" not in (tmp_path / "b.html").read_text()


def test_find_atlas_by_its_networks_weights(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_atlas("abc") is None
    for name in ("2026-01-01", "2026-01-02", "2026-01-03"):
        shutil.copytree(page.parent, f"outputs/deconvnet/{name}/atlas")
    numbers = Path("outputs/deconvnet/2026-01-03/atlas/atlas.json")
    numbers.write_text(numbers.read_text().replace('"abc"', '"another"'))
    assert find_atlas("abc") == Path("outputs/deconvnet/2026-01-02/atlas/index.html")
    with pytest.raises(UserError, match=r"job\.pages=outputs/deconvnet/2026-01-03: contains no atlas of this network"):
        find_atlas("abc", "outputs/deconvnet/2026-01-03")


def test_find_verdict_by_its_networks_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_verdict("abc", "guided") is None
    table = "layer,map,method,measure,n,clusters,mean,se\nconv1,3,guided,own,1,1,0.5,\nconv1,3,gradient,own,1,1,0.1,\n"
    for name, weights in (("2026-01-01", "abc"), ("2026-01-02", "abc"), ("2026-01-03", "another"), ("old", "abc")):
        Path("outputs/verdict", name).mkdir(parents=True)
        Path("outputs/verdict", name, "verdict.json").write_text(json.dumps({"weights": weights, "split": "test"}))
        if name != "old":
            Path("outputs/verdict", name, "maps.csv").write_text(table)
    Path("outputs/verdict/z").mkdir()
    Path("outputs/verdict/z/verdict.json").write_text("{")  # damaged: its network is unknown
    found = find_verdict("abc", "guided")
    assert found == Verdict("2026-01-02", "test", {("conv1", 3): {"own": (0.5, None, 1)}})
    for name in ("2026-01-03", "old", "nowhere"):
        with pytest.raises(UserError, match=rf"job\.verdict=outputs/verdict/{name}: contains no verdict of this"):
            find_verdict("abc", "guided", f"outputs/verdict/{name}")
    with pytest.raises(UserError, match=r"z/verdict\.json cannot be read"):
        find_verdict("abc", "guided", "outputs/verdict/z")
    path = Path("outputs/verdict/2026-01-01/maps.csv")
    for damage in (table.replace("0.5", "nan"), table[:60], table.replace("mean", "x"), "\0", "layer\nconv1\n"):
        path.write_text(damage)
        with pytest.raises(UserError, match=r"maps\.csv cannot be read as the scores of maps"):
            find_verdict("abc", "guided", "outputs/verdict/2026-01-01")
    assert find_verdict("abc", "guided") == found
    Path("outputs/verdict/2026-01-02/maps.csv").write_text("\0")
    assert find_verdict("abc", "guided") is None  # damaged ones are skipped unless they are named


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("outputs/50% #1?/atlas.html", "../outputs/50%25%20%231%3F/atlas.html"),
        ("a/javascript:1/atlas.html", "javascript%3A1/atlas.html"),
        ("a/\udcff/atlas.html", "%FF/atlas.html"),
    ],
)
def test_link_to_a_folder_of_any_name(page: str, link: str) -> None:
    assert link_to(Path(page), Path("a")) == link


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_atlas_in_one_file(page: Path, tmp_path: Path) -> None:
    """The file contains the bytes of all pictures and needs no other file."""
    folder = tmp_path / "atlas"
    shutil.copytree(page.parent, folder)
    single = write_single(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atlas.html", "atlas.json"]
    assert find_atlas("abc", str(tmp_path)) == single
    with browser(tmp_path / "profile") as b:
        b.open(single)
        b.run("location.hash = '#conv5/1'")
        b.wait("document.querySelector('#tiles .view')")
        name = "maps/conv5/1.webp"
        assert b.run("return getComputedStyle(document.querySelector('#tiles .view')).backgroundImage").startswith(
            'url("blob:'
        )
        text = b.run(f"return document.getElementById('{name}').textContent")
        assert base64.b64decode(text) == (page.parent / name).read_bytes()
        b.wait("document.getElementById('image').naturalWidth === 32")
        assert not b.messages()


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
        assert len(cards()) == ALL
        assert b.run("return document.querySelectorAll('.card.dead').length") == 1
        assert f"{ALL} of {ALL} maps, 1 never active" in b.run("return document.getElementById('count').textContent")
        # search by number, by layer, by class (one with a space, one with markup), by conditions, and for nothing
        assert put("search", "5") == ["#conv1/5", "#conv5/5"]
        assert put("search", "conv5 5") == ["#conv5/5"]
        assert 0 < len(put("search", "sea lion")) <= ALL
        assert len(put("search", "<b>bold")) > 0
        assert put("search", "dead") == ["#conv1/3"]
        assert put("search", "zebra") == []
        assert put("search", "conv5 match>0.865") == [f"#conv5/{n}" for n in range(4)]
        assert len(put("search", "effect>0.5")) + len(put("search", "effect<0.5")) == ALL
        assert put("search", "images<0") == []
        assert put("search", "own>0.5") == ["#conv1/0"]
        assert put("search", "own<0.5") == ["#conv5/2"]
        assert len(put("search", "images<101%")) == ALL
        assert len(put("search", "")) == ALL
        # sort
        for key, script in {
            "activation": "-(m.dead ? -Infinity : m.top[0][0])",
            "selectivity": "-(m.selectivity - m.chance)",
            "sparsity": "m.dead ? 2 : m.positions",
            "effect": "-Math.max(...m.effect.map((e) => Math.abs(e[1])))",
            "match": "-m.nearest[0][2]",
        }.items():
            shown = put("sort", key)
            values = b.run(f"return state.shown.map((m) => {script})")
            assert len(shown) == ALL
            values = [float("inf") if v is None else v for v in values]  # JSON has no infinity
            assert values == sorted(values)
        assert put("sort", "own")[:2] == ["#conv1/0", "#conv5/2"]
        put("sort", "number")
        # show only one layer, and the other kind of pictures
        b.run("[...document.querySelectorAll('#layers button')].find((e) => e.value === 'conv5').click()")
        assert cards() == [f"#conv5/{n}" for n in range(6)]
        put("kind", "patches")
        assert "conv5_patches" in b.run("return document.querySelector('.thumbnail').style.backgroundImage")
        # open a map, its image and its neighbour, and close it
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
        # a map's scores, on the page and in its numbers
        b.run("location.hash = '#conv1/0'")
        b.wait("document.getElementById('scores').textContent === 'own80 ± 2'")
        assert "4 of its activations, validation" in b.run("return document.getElementById('judged').textContent")
        numbers = "document.getElementById('json').href.replace('data:application/json,', '')"
        assert b.run(f"return JSON.parse(decodeURIComponent({numbers}))")["scores"] == {
            "own": {"mean": 0.8, "error": 0.021, "n": 4}
        }
        b.run("location.hash = '#conv1/1'")
        b.wait("document.getElementById('judged').textContent.startsWith('none of its')")
        # open a dead map by its address
        b.run("location.hash = '#conv1/3'")
        b.wait("document.getElementById('statistics').textContent.startsWith('Never active')")
        # switch between light and dark
        before = b.run("return getComputedStyle(document.body).backgroundColor")
        b.run("document.getElementById('theme').click()")
        assert b.run("return getComputedStyle(document.body).backgroundColor") != before
        # all pictures have loaded, and the console has no messages
        assert b.run("return document.querySelectorAll('button:not([aria-label]):empty').length") == 0
        assert b.messages() == []
