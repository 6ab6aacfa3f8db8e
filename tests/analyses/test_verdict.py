"""The verdict: methods that know the answer score 1, uninformed methods score 0; and the job as a command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.explain.trained import Trained
from tests.helpers import load_for_job, read_csv, write_images
from zfnet.analyses import verdict
from zfnet.analyses.deconvnet import shuffle_weights
from zfnet.analyses.verdict import METRICS, SCORES, Row, Study, Subject, compare_methods, prepare, significance_lines
from zfnet.data.shapes import draw_without
from zfnet.explain.atlas import find_verdict
from zfnet.explain.selection import chosen_split
from zfnet.explain.targets import BASELINES, Target
from zfnet.model.chain import OUTPUT, Chain
from zfnet.runs.directory import RunDirectory

WORDS = ("job.images=4", "job.units=4", "job.others=3", "job.cells=3", "job.sectors=4", "job.ablation_images=20")


def study_of(run: RunDirectory, *words: str) -> Study:
    loaded = load_for_job(run, "job=verdict", *WORDS, *words)
    job: Any = loaded.config.job
    layers = job.layers or loaded.chain.conv_layers
    return prepare(job, loaded, chosen_split(loaded), layers)


def scores(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    return {(row.target, row.method, row.measure): row for row in rows}


@pytest.fixture(scope="module")
def study(trained: Trained) -> Study:
    return study_of(trained.run, "job.split=test", "job.layers=[conv2,conv5]", "job.images=16")


def test_prepare_takes_the_strongest_activations(study: Study) -> None:
    target = study.subjects[0].target
    maps = study.loaded.chain.activations(target.images, ["conv2"])["conv2"].detach()
    image, channel, y, x = target.units.unbind(1)
    assert maps[image, channel, y, x].tolist() == maps[image, channel].amax((1, 2)).tolist()
    assert len(channel.unique()) == 4
    assert [s.name for s in study.subjects] == ["conv2", "conv5", "class"]


def test_weights_scores_of_fixed_baselines_are_zero(study: Study) -> None:
    found = scores(list(METRICS["weights"](dataclasses.replace(study, subjects=study.subjects[:1]))))
    for method in ("Sobel", "|input|", "centre"):  # these do not depend on the network
        assert found["conv2", method, "weights"].values.abs().max() < 1e-9
    assert found["conv2", "random", "weights"].values.nanmean() > 0.8
    assert found["conv2", "deconvnet", "weights"].values.nanmean() > 0.2
    stages = {measure for target, method, measure in found if (target, method) == ("conv2", "gradient")}
    assert {"top-down conv1 ssim", "bottom-up conv2 signed", "bottom-up conv1 unsigned"} <= stages
    last = [found["conv2", "deconvnet", f"{way} unsigned"] for way in ("top-down conv1", "bottom-up conv2")]
    assert torch.equal(last[0].values, last[1].values)  # both ways end with all layers shuffled


@pytest.fixture
def linear(study: Study, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A linear network of four classes. Each is a weighted sum of another quarter of a white image.

    The gradient equals the weights. `guided` is replaced by a control: the picture of the next class.
    """
    network = nn.Sequential(nn.Conv2d(3, 4, 12, bias=False), nn.Flatten())
    weight = network[0].weight.detach().zero_()
    for k, quarter in enumerate(weight):
        place = (..., slice(k // 2 * 6, k // 2 * 6 + 6), slice(k % 2 * 6, k % 2 * 6 + 6))
        quarter[place] = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(k)) + 0.1
    units = torch.tensor([[k, k, 0, 0] for k in range(4)])
    target, picture = Target(Chain(network.eval(), 12), OUTPUT, torch.ones(4, 3, 12, 12), units), Target.picture

    def of_next(self: Target, method: str, **settings: Any) -> Tensor:
        if method == "guided":
            asked = settings.get("units", units)
            settings["units"] = torch.cat([asked[:, :1], (asked[:, 1:2] + 1) % 4, asked[:, 2:]], 1)
        return picture(self, method, **settings)

    monkeypatch.setattr(Target, "picture", of_next)
    monkeypatch.setattr(Target, "methods", ("gradient", "guided"))
    job = dataclasses.replace(study.job, others=None)
    return dataclasses.replace(study, job=job, subjects=[Subject("class", target, torch.arange(4))])


def test_own_picture_of_a_linear_class_is_above_all_others(linear: Study) -> None:
    found = scores(list(METRICS["own"](linear)))
    assert found["class", "gradient", "own"].values.tolist() == [1] * 4
    # one other picture shows this class's quarter; the other two and the own picture show none of it
    assert found["class", "guided", "own"].values.tolist() == pytest.approx([-1 / 3] * 4)


def test_removal_by_the_weights_of_a_linear_class_is_the_best_order(linear: Study, monkeypatch) -> None:
    monkeypatch.setattr(verdict, "BASELINES", ())
    monkeypatch.setattr(verdict, "FILLINGS", ("mean colour", "blur"))
    found = scores(list(METRICS["removal"](linear)))
    for name in ("deletion", "insertion"):
        assert found["class", "gradient", f"{name}, mean colour"].values.tolist() == pytest.approx([1] * 4)
        assert found["class", "guided", f"{name}, mean colour"].values.mean() < 0
        assert found["class", "gradient", f"{name}, blur"].values.isnan().all()  # blur does not change a white image


def test_removal_divides_a_small_field_into_as_many_cells_as_it_has_pixels(study: Study) -> None:
    network = nn.Sequential(nn.Conv2d(3, 40, 3, bias=False), nn.Flatten())
    weight = network[0].weight.detach()
    weight.copy_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)))
    units = torch.tensor([[k, k, 0, 0] for k in range(40)])
    target = Target(Chain(network.eval(), 3), OUTPUT, torch.ones(40, 3, 3, 3), units)
    job = dataclasses.replace(study.job, cells=6)
    subjects = [Subject("class", target, torch.arange(40))]
    found = scores(list(METRICS["removal"](dataclasses.replace(study, job=job, subjects=subjects))))
    for name in ("deletion, mean colour", "insertion, mean colour"):
        assert found["class", "gradient", name].values.tolist() == pytest.approx([1] * 40)
        assert abs(float(found["class", "|input|", name].values.mean())) < 0.2  # equal pixels have a random order


def test_weights_of_a_linear_class_are_compared_with_its_shuffled_ones(linear: Study) -> None:
    target = linear.subjects[0].target
    twin: Any = shuffle_weights(target.chain, OUTPUT, linear.seed).model
    own: Any = target.chain.model
    found = scores(list(METRICS["weights"](linear)))["class", "gradient", "weights"].values
    for k, value in enumerate(found.tolist()):
        sizes = [net[0].weight[k].sum(0).flatten() for net in (own, twin)]
        ranks = [(s[:, None] > s).double().sum(1) - (s[:, None] < s).double().sum(1) for s in sizes]  # equal if tied
        assert value == pytest.approx(1 - abs(float(torch.corrcoef(torch.stack(ranks))[0, 1])))
    assert found.min() > 0.7  # close to 1: no similarity is left


def test_stability_is_1_if_the_image_is_ignored_and_0_if_drawn_anew(
    linear: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, given, picture = linear.subjects[0].target, [], Target.picture

    def spy(self: Target, method: str, **settings: Any) -> Tensor:
        given.append(settings.get("images", target.images) - target.images)
        return picture(self, method, **settings)

    monkeypatch.setattr(Target, "picture", spy)
    found = scores(list(METRICS["stability"](linear)))
    assert found["class", "gradient", "stability"].values.tolist() == pytest.approx([1] * 4)
    assert found["class", "centre", "stability"].values.tolist() == pytest.approx([1] * 4)
    assert abs(found["class", "random", "stability"].values.mean()) < 4 / (4 * 144) ** 0.5  # control
    noise = given[0] * torch.tensor(linear.loaded.data.std).view(3, 1, 1) * 255
    torch.testing.assert_close(noise.abs(), torch.ones(4, 3, 12, 12))
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5


def test_pointing_of_pictures_that_know_the_place_and_that_do_not(study: Study, monkeypatch) -> None:
    """A picture of the box scores 1. In mosaics, a picture that ignores the class scores exactly 0."""
    subject = study.subjects[-1]
    boxes = study.split.images.boxes
    assert boxes is not None
    known = Target.picture

    def picture(self: Target, method: str, **settings: Any) -> torch.Tensor:
        if method != "guided":
            return known(self, method, **settings)
        maps = torch.zeros(len(self.units), 1, *self.images.shape[2:])
        if self is subject.target:
            for one, (top, left, bottom, right) in zip(maps, boxes[subject.numbers].tolist(), strict=True):
                one[0, top:bottom, left:right] = 1
        else:  # mosaics of 64 px
            for number, one in enumerate(maps):
                one[0, number % 4 // 2 * 32 :, number % 2 * 32 :][:32, :32] = 1
        return maps + 1e-9

    monkeypatch.setattr(Target, "picture", picture)
    found = scores(list(METRICS["pointing"](study)))
    assert found["class", "guided", "box"].values.min() > 0.99
    assert abs(found["class", "centre", "box"].values.mean()) < 0.1
    for method in ("Sobel", "|input|", "centre"):
        assert found["class", method, "mosaic"].values.mean() == pytest.approx(0, abs=1e-6)
    mosaic = found["class", "guided", "mosaic"]
    assert mosaic.values.min() > 0.99
    assert len(mosaic.clusters.unique()) == len(mosaic.values) / 4


def test_parts_of_the_true_effect_score_1(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is the squared distance to the image without a shape, so each part adds its pixels' distance."""
    subject = study.subjects[-1]
    rows, side = study.split.images.rows[subject.numbers], study.split.images.images.shape[1]
    ground = verdict.to_inputs(study.loaded, draw_without(rows, side, 1, 0, 1))
    effect = (subject.target.images - ground).double().square()
    shown = {"centre": effect, "Sobel": effect.roll(1, 0)}  # control: the effect of another image
    monkeypatch.setattr(Target, "methods", ())
    monkeypatch.setattr(
        Target, "value", lambda _, frames, item: (frames - ground[item]).double().square().sum((1, 2, 3))
    )
    monkeypatch.setattr(Target, "picture", lambda _, method, **__: shown.get(method, torch.ones_like(effect)))
    found = scores(list(METRICS["parts"](dataclasses.replace(study, subjects=[subject]))))
    assert found["class", "centre", "parts"].values.nanmean() > 0.999
    assert found["class", "Sobel", "parts"].values.nanmean() < 0.6


def test_own_of_baselines_is_chance_and_of_ones_own_unit_is_not(study: Study) -> None:
    found = scores(list(METRICS["own"](study)))
    for method in BASELINES:
        assert found["conv5", method, "own"].values.eq(0).all()
    for target in ("conv5", "class"):
        assert found[target, "gradient", "own"].values.nan_to_num().ne(0).any()
    assert found["conv2", "gradient", "own"].values.isfinite().any()


def test_others_are_all_that_are_active_at_the_same_place(study: Study) -> None:
    target, job = study.subjects[0].target, dataclasses.replace(study.job, others=None)
    maps = study.loaded.chain.activations(target.images, ["conv2"])["conv2"]
    found, few = verdict._others(dataclasses.replace(study, job=job), target), verdict._others(study, target)
    for (image, channel, y, x), row, drawn in zip(target.units.tolist(), found.tolist(), few.tolist(), strict=True):
        active = set((maps[image, :, y, x] > 0).nonzero().flatten().tolist()) - {channel}
        assert set(row) - {-1} == active
        assert set(drawn) <= active
        assert len(set(drawn)) == 3
    classes = study.subjects[-1].target
    assert verdict._others(dataclasses.replace(study, job=job), classes)[0].sort().values.tolist() == [
        c for c in range(10) if c != classes.units[0, 1]
    ]


def test_ablation_of_a_map_is_the_network_without_it(study: Study) -> None:
    found = scores(list(METRICS["ablation"](study)))
    selected = found["conv5", "ablation", "class of it"].values
    maps = found["conv5", "ablation", "class of it"].clusters
    model, split, place = study.loaded.model, study.split.images, 1
    numbers = verdict.sample(study.loaded, split, 20)
    inputs, labels = verdict.to_inputs(study.loaded, split.pixels(numbers)), split.labels[numbers]
    with torch.no_grad():
        before = model(inputs)
        hook = study.loaded.chain.up_to("conv5")[-1].module.register_forward_hook(
            lambda module, given, out: out.index_fill(1, maps[place : place + 1], 0)
        )
        after = model(inputs)
        hook.remove()
    change = (after - before)[torch.arange(len(labels)), labels]
    lost = torch.stack([change[labels == c].mean() for c in range(10)])
    assert int(lost.argmin()) == selected[place]
    torch.testing.assert_close(
        float(found["conv5", "ablation", "largest logit loss"].values[place]), float(lost.min()), rtol=1e-3, atol=1e-5
    )
    hits = ((after.argmax(1) == labels).float() - (before.argmax(1) == labels).float()).mean()
    assert float(found["conv5", "ablation", "accuracy change"].values[place]) == pytest.approx(float(hits), abs=1e-6)


def test_ablation_agrees_with_the_class_that_loses_and_with_no_other(study: Study) -> None:
    def agreement(best: Tensor) -> list[float]:
        stats = dataclasses.replace(study.statistics["conv5"], best_class=best, dead=torch.zeros(len(best)).bool())
        rows = scores(list(METRICS["ablation"](dataclasses.replace(study, statistics={"conv5": stats}))))
        found.append(rows["conv5", "ablation", "class of it"].values)
        return rows["conv5", "ablation", "agreement"].values.tolist()

    found: list[Tensor] = []
    agreement(study.statistics["conv5"].best_class)
    lost = found[0].long()
    assert agreement(lost) == [1] * len(lost)
    assert agreement((lost + 1) % 10) == pytest.approx([-1 / 9] * len(lost))  # 0 is a guess among ten classes


def test_ablation_of_maps_that_are_not_active_agrees_with_nothing(study: Study) -> None:
    job = dataclasses.replace(study.job, ablation_images=2)
    found = scores(list(METRICS["ablation"](dataclasses.replace(study, job=job))))
    loses, lost, agrees = (
        found["conv5", "ablation", name].values for name in ("largest logit loss", "class of it", "agreement")
    )
    assert agrees.isfinite().tolist() == lost.isfinite().tolist() == (loses < 0).tolist()
    assert 0 < int(agrees.isfinite().sum()) < len(agrees)


@pytest.mark.parametrize(("classes", "scores_of_agreement"), [([2, 5], {-1.0, 1.0}), ([2], set())])
def test_ablation_guesses_among_the_classes_that_have_images(
    study: Study, classes: list[int], scores_of_agreement: set[float]
) -> None:
    images = study.split.images
    known = torch.isin(images.labels, torch.tensor(classes)).nonzero().flatten()
    split = dataclasses.replace(study.split, images=images.take(known))
    job = dataclasses.replace(study.job, ablation_images=len(known))
    statistics = {"conv5": study.statistics["conv5"]}
    found = scores(list(METRICS["ablation"](dataclasses.replace(study, split=split, job=job, statistics=statistics))))
    values = found["conv5", "ablation", "agreement"].values
    assert set(values[values.isfinite()].tolist()) <= scores_of_agreement
    line = list(verdict._ablation_lines({"conv5": verdict.clustered_mean(values, torch.arange(len(values)))}))
    assert bool(line) == (len(classes) > 1)


def test_compare_methods_tells_a_difference_from_none() -> None:
    """Errors are clustered by image: fifty units of two images count as two observations."""
    generator = torch.Generator().manual_seed(0)
    noise, clusters = torch.rand(40, generator=generator).double(), torch.arange(40)
    rows = [Row("class", name, "deletion", noise + k, clusters) for k, name in enumerate(("random", "Sobel"))]
    rows += [Row("class", "gradient", "deletion", torch.rand(40, generator=generator).double() + 3, clusters)]
    rows[1] = Row("class", "Sobel", "deletion", torch.rand(40, generator=generator).double(), clusters)
    found = {(d["first"], d["second"]): d for d in compare_methods(rows)}
    assert found["random", "Sobel"]["p_holm"] > 0.05
    assert found["random", "gradient"]["p_holm"] < 1e-6
    assert significance_lines("class", list(found.values())) == [
        "class, deletion: above chance: gradient; above all baselines: gradient"
    ]
    units = torch.cat([torch.full((25,), 0.0), torch.full((25,), 1.0)]).double() + 0.01 * torch.rand(
        50, generator=generator
    )
    pair = [Row("class", n, "own", v, torch.arange(50) // 25) for n, v in (("random", 0 * units), ("guided", units))]
    (one,) = compare_methods(pair)
    assert (one["clusters"], one["p"] > 0.2) == (2, True)
    always = [
        Row("class", n, "own", torch.full((9,), v), torch.arange(9)) for n, v in (("random", 0.0), ("guided", 1.0))
    ]
    assert significance_lines("class", compare_methods(always)) == [
        "class, own: above chance: guided; above all baselines: guided"
    ]


def test_every_number_of_the_figure_has_its_error() -> None:
    measures = [*SCORES, *(f"top-down {layer} {kind}" for layer in ("fc8", "conv1") for kind in ("signed", "unsigned"))]
    row = {"method": "guided", "n": 4, "clusters": 4, "mean": 0.5, "se": 0.1}
    table = [{**row, "target": target, "measure": measure} for target in ("conv1", "class") for measure in measures]
    axes = [axis for axis in verdict.draw_verdict(table, ["conv1", "class"]).axes if axis.get_visible()]
    assert [len(axis.containers) for axis in axes] == [1] * len(SCORES) + [2, 2]
    for axis in axes:
        for points in axis.containers:
            (bars,) = points.lines[2]
            assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.4, 0.6]] * 2


def test_row_survives_json() -> None:
    row = Row("conv1", "guided", "own", torch.tensor([0.5, torch.nan]).double(), torch.tensor([3, 4]))
    again = Row.from_dict(json.loads(json.dumps(row.to_dict())))
    assert torch.equal(again.values.nan_to_num(9), row.values.nan_to_num(9))
    assert torch.equal(again.clusters, row.clusters)


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"of": {}}', '{"of": {}, "rows": [{}]}', '{"of": {}, "rows": [{"values": "x"}]}']
)
def test_damaged_rows_of_a_metric_are_one_line(tmp_path: Path, damage: str) -> None:
    run = RunDirectory(tmp_path)
    assert verdict.saved_rows(run, "own", {}) is None
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/own.json").write_text(damage)
    with pytest.raises(verdict.UserError, match=r"metrics/own\.json is damaged: delete it"):
        verdict.saved_rows(run, "own", {})
    (tmp_path / "metrics/own.json").write_text('{"of": {"weights": "others"}, "rows": []}')
    assert verdict.saved_rows(run, "own", {}) is None


@pytest.mark.drawn
def test_verdict_writes_all_and_continues(run_py, tiny_run: RunDirectory, monkeypatch) -> None:
    words = (
        "job=verdict",
        f"run={tiny_run.folder}",
        *WORDS,
        "job.layers=[conv1]",
        "job.metrics=[own,pointing,own,removal,parts,ablation,stability]",
        "hydra.run.dir=out",
        "trainer.threads=1",
    )

    def keep(row: dict[str, Any]) -> bool:
        return (row["target"], row["method"]) == ("conv1", "guided")

    def refuse(study: Study) -> Any:
        raise verdict.UserError("no")

    monkeypatch.setitem(METRICS, "stability", refuse)
    assert run_py(*words).code == 1
    before = Path("out/metrics/removal.json").read_text()
    assert not Path("out/metrics/stability.json").exists()
    monkeypatch.setitem(METRICS, "stability", verdict.measure_stability)
    monkeypatch.setitem(METRICS, "removal", lambda study: pytest.fail("the metric was measured again"))
    answer = run_py(*words)
    assert answer.code == 0, answer.err
    assert Path("out/metrics/removal.json").read_text() == before
    rows = read_csv(Path("out/verdict.csv"))
    assert {row["measure"] for row in rows} >= set(SCORES) - {"weights"}
    assert len({(row["target"], row["method"], row["measure"]) for row in rows}) == len(rows)  # no duplicates
    assert {row["target"] for row in rows} == {"conv1", "units", "class"}
    assert {row["method"] for row in rows} == {
        *("deconvnet", "guided", "gradient", "integrated", "Grad-CAM"),
        *BASELINES,
        "ablation",
    }
    summary = json.loads(Path("out/verdict.json").read_text())
    assert set(summary["ablation"]) == {"conv1"}
    assert Path("out/figures/verdict.png").stat().st_size > 50_000
    assert len(read_csv(Path("out/ablation.csv"))) >= 2
    assert read_csv(Path("out/differences.csv"))
    # a map's scores, which the atlas shows, are the means over its units
    weights = summary["weights"]
    found = find_verdict(weights, "guided", "out")
    assert found is not None
    rows = {r["measure"]: r for r in json.loads(Path("out/metrics/removal.json").read_text())["rows"] if keep(r)}
    units = study_of(tiny_run, "job.layers=[conv1]").subjects[0].target.units[:, 1].tolist()
    for number in set(units):
        values = [v for v, n in zip(rows["deletion"]["values"], units, strict=True) if n == number]
        mean, _, n = found.scores["conv1", number]["deletion"]
        assert (mean, n) == (pytest.approx(sum(values) / len(values), abs=1e-4), len(values))
    assert [line for line in answer.out.splitlines() if len(line) > 80 and str(Path.cwd()) not in line] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["job.layers=[conv9]"], "job.layers=conv9: the network has no such convolution"),
        (["job.metrics=[]"], "job.metrics=[]: names no metric; null means all of them"),
        (["job.metrics=[delition]"], "job.metrics=delition: there is no such metric"),
        (
            ["job.split=validation", "data.validation=0", "trainer.monitor=train_loss"],
            "job.split=validation: data=shapes has no validation images",
        ),
        (["job.images=1"], "job.images=1: must be at least 4"),
        (["job.layers=[fc6]"], "job.layers=fc6: the network has no such convolution; known: conv1"),
        (["job.others=0"], "job.others=0: must be at least 1"),
    ],
)
def test_verdict_refuses_bad_input_in_one_line(run_py, tiny_run: RunDirectory, words: list[str], expected: str) -> None:
    answer = run_py("job=verdict", f"run={tiny_run.folder}", *words, "hydra.run.dir=out", "trainer.threads=1")
    assert expected in answer.error


def test_verdict_of_ablation_alone_has_no_scores_to_draw(run_py, tiny_run: RunDirectory) -> None:
    words = ("job.layers=[conv1]", "job.metrics=[ablation]", "hydra.run.dir=out", "trainer.threads=1")
    answer = run_py("job=verdict", f"run={tiny_run.folder}", *WORDS, *words)
    assert answer.code == 0, answer.err
    assert "conv1" in answer.out
    assert "Significant" not in answer.out


def test_verdict_on_data_without_parts_is_one_line(tiny_run: RunDirectory, tmp_path: Path) -> None:
    root = write_images(tmp_path / "photos", {"disc": 4, "ring": 4}, size=64)
    words = (*WORDS, "job.layers=[conv1]", "job.metrics=[parts]", "data=folder", f"data.root={root}", "job.split=train")
    config = load_for_job(tiny_run, "job=verdict", *words).config
    with pytest.raises(verdict.UserError, match=r"job\.metrics=\[parts\]: data=folder does not have the parts, boxes"):
        config.job.main(config, tmp_path / "out")


def test_prepare_without_any_active_map_is_one_line(trained: Trained) -> None:
    loaded = load_for_job(trained.run, "job=verdict", *WORDS, "job.split=test")
    job: Any = loaded.config.job
    with torch.no_grad():
        for step in loaded.chain.up_to("conv1"):
            for name, parameter in step.module.named_parameters():
                parameter.fill_(-1 if name == "bias" else 0)
    split = chosen_split(loaded)
    with pytest.raises(verdict.UserError, match=r"job\.layers: no map of conv1 is ever active"):
        prepare(job, loaded, split, ["conv1"])
