"""Compare the streaming search with brute force, for any batches and after an interruption."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.explain.networks import chain
from tests.helpers import compose
from zfnet.data import Batches
from zfnet.data.images import image_set
from zfnet.explain.top_activations import TopActivations, collect, selectivity


def brute_force(maps: Tensor, top: int) -> list[list[tuple[float, int, int]]]:
    """Return the (value, image, position) of each map's `top` best images by sorting all; maps is [N, C, H, W]."""
    answer = []
    for channel in range(maps.shape[1]):
        rows = []
        for n in range(len(maps)):
            flat = maps[n, channel].flatten().tolist()
            rows.append((-max(flat), n, flat.index(max(flat))))
        answer.append([(-v, n, p) for v, n, p in sorted(rows)[:top]])
    return answer


def entries(collection: TopActivations, layer: str) -> list[list[tuple[float, int, int]]]:
    record = collection.layers[layer]
    return [
        list(zip(*(field[c].tolist() for field in (record.values, record.index, record.position)), strict=True))
        for c in range(len(record.values))
    ]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(3, 20),
    top=st.integers(1, 3),
    batch=st.integers(1, 20),
    backwards=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_top_activations_equal_brute_force_in_any_division_and_order(count, top, batch, backwards, seed) -> None:
    """The maps have few distinct values, so that many images and positions tie."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, 4, (count, 3, 2, 3), generator=generator).float()
    labels = torch.randint(0, 4, (count,), generator=generator)
    collection = TopActivations(top, 4)
    chunks = list(torch.arange(count).split(batch))
    for chunk in reversed(chunks) if backwards else chunks:
        collection.add({"conv1": maps[chunk]}, chunk, labels[chunk])
    assert entries(collection, "conv1") == brute_force(maps, top)
    statistics = collection.statistics("conv1")
    torch.testing.assert_close(statistics.mean, maps.double().mean((0, 2, 3)))
    for label in range(4):
        if (labels == label).any():
            expected = maps[labels == label].double().mean((0, 2, 3))
            torch.testing.assert_close(statistics.class_means[:, label], expected)
    torch.testing.assert_close(statistics.image_share, (maps.amax((2, 3)) > 0).float().mean(0))
    torch.testing.assert_close(statistics.position_share, (maps > 0).float().mean((0, 2, 3)))


def test_top_activations_of_few_images_and_dead_maps() -> None:
    collection = TopActivations(3, 2)
    maps = torch.zeros(2, 2)
    maps[1, 1] = 5.0
    collection.add({"fc6": maps}, torch.tensor([0, 1]), torch.tensor([0, 1]))
    record = collection.layers["fc6"]
    assert record.values.tolist() == [[0, 0, float("-inf")], [5, 0, float("-inf")]]
    assert record.filled.tolist() == [[False] * 3, [True, False, False]]
    assert collection.statistics("fc6").dead.tolist() == [True, False]


def test_selectivity_by_chance_tells_rare_noise_from_a_class() -> None:
    """Maps that ignore classes, but are active on 2 % of images, have an index of 0.6, as with shuffled labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(500) % 10
    rare = (torch.rand(500, 200, generator=generator) < 0.02) * torch.rand(500, 200, generator=generator)
    of_class = torch.rand(500, 20, generator=generator) * (1 + (labels == 3))[:, None]
    collection = TopActivations(1, 10, labels)
    for chunk in torch.arange(500).split(130):
        collection.add({"fc6": torch.cat([rare, of_class], 1)[chunk]}, chunk, labels[chunk])
    statistics = collection.statistics("fc6")
    excess = statistics.selectivity - statistics.chance
    assert statistics.selectivity[:200].mean() > 0.5
    assert excess[:200].mean() == pytest.approx(0, abs=0.03)
    assert (statistics.p[:200] <= 0.05).float().mean() < 0.12
    assert excess[200:].min() > excess[:200].median()
    assert (statistics.p[200:] == 0.05).all()
    assert statistics.selectivity[200:].mean() < statistics.selectivity[:200].mean()  # misleading alone
    alone = TopActivations(1, 10)
    alone.add({"fc6": rare}, torch.arange(500), labels)
    assert alone.statistics("fc6").chance.isnan().all()


def test_classes_without_images_take_no_memory_and_change_nothing() -> None:
    labels, maps = torch.arange(40) % 4, torch.rand(40, 3)
    few, many = TopActivations(1, 4, labels), TopActivations(1, 1000, labels * 300 + 7)
    few.add({"fc6": maps}, torch.arange(40), labels)
    many.add({"fc6": maps}, torch.arange(40), labels * 300 + 7)
    assert few.layers["fc6"].sums.shape == many.layers["fc6"].sums.shape
    expected, found = few.statistics("fc6"), many.statistics("fc6")
    for key in ("mean", "selectivity", "chance", "p"):
        assert torch.equal(getattr(found, key), getattr(expected, key))
    assert torch.equal(found.best_class, expected.best_class * 300 + 7)
    assert torch.equal(found.class_means[:, 7::300], expected.class_means)
    assert found.class_means.count_nonzero() == 12
    old, metadata = few.state()  # like the state that an older version saved
    del old["known"]
    again = TopActivations.from_state(old, metadata, torch.device("cpu"))
    assert torch.equal(again.statistics("fc6").class_means, expected.class_means)


def test_selectivity_by_hand() -> None:
    means = torch.tensor([[3.0, 1, 1, 9], [2, 2, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    index, best = selectivity(means, torch.tensor([True, True, True, False]))
    assert index.tolist() == [(3 - 1) / (3 + 1), 0, 1, 0]
    assert best.tolist()[:1] + best.tolist()[2:3] == [0, 1]
    without_relu = torch.tensor([[2.0, -1, -3], [-3, -2, -1]])
    index, best = selectivity(without_relu, torch.ones(3, dtype=torch.bool))
    assert (index.tolist(), best.tolist()) == ([1, 0], [0, 2])


@pytest.mark.parametrize(
    ("name", "layers"), [("pad", ["conv2", "conv5", "fc7"]), ("alexnet", ["features.3", "features.10", "classifier.4"])]
)
def test_collect_in_one_pass_and_after_an_interruption(name: str, layers: list[str]) -> None:
    model = chain(name)
    model.model.float().train()
    data = compose("experiment=quickstart", "data.batch_size=4").data
    pixels = torch.randint(0, 256, (11, 64, 64, 3), dtype=torch.uint8).numpy()
    images = image_set(pixels, torch.arange(11) % 4, list("abcd"))

    def batches_of(images):
        return Batches(images, data, torch.device("cpu"))

    whole = collect(model, images, batches_of, layers, TopActivations(3, 4, images.labels))
    assert model.model.training
    model.model.eval()
    activations = model.activations(next(batches_of(images.take(torch.arange(4))).in_order()).images, layers)
    seen = whole.layers[layers[1]]
    for channel, (row, values) in enumerate(zip(seen.places(), seen.values, strict=True)):
        for (n, y, x), value in zip(row.tolist(), values.tolist(), strict=True):
            if n < 4:
                assert activations[layers[1]][n, channel, y, x].item() == pytest.approx(value, rel=1e-5)

    class Interrupted(Exception):
        pass

    saved = []

    def interrupt(collection: TopActivations) -> None:
        saved.append(collection.state())
        if collection.images >= 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        collect(model, images, batches_of, layers, TopActivations(3, 4, images.labels), interrupt)
    again = TopActivations.from_state(*saved[-1], torch.device("cpu"))
    assert again.images == 8
    collect(model, images, batches_of, layers, again)
    for layer in layers:
        for key, value in vars(whole.layers[layer]).items():
            assert torch.equal(value, getattr(again.layers[layer], key)) if isinstance(value, Tensor) else True
    assert again.class_counts.tolist() == whole.class_counts.tolist()
