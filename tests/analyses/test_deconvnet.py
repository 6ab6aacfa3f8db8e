"""The controls of the deconvnet (each changes what its name says), Spearman's correlation, and the job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.explain.networks import network, random_inputs
from tests.helpers import random_images, read_csv, train_tiny
from zfnet import load_run
from zfnet.analyses.deconvnet import (
    CONTROLS,
    compare_controls,
    dead_window_sensitivity,
    draw_controls,
    draw_photograph,
    draw_projections,
    inside_frames,
    project_controls,
    rank_correlation,
    shuffle_weights,
)
from zfnet.config.errors import UserError
from zfnet.data import load_splits, preprocess
from zfnet.explain import Deconvnet, atlas, receptive_box
from zfnet.explain.top_activations import TopActivations
from zfnet.runs.session import Stopped
from zfnet.runs.weights import weights_hash


def test_draw_photograph_takes_any_name() -> None:
    nothing = torch.zeros(0, 4, 4, 3, dtype=torch.uint8)
    layers = {"conv1": atlas.Strongest([], [], nothing, nothing)}
    picture = torch.zeros(8, 8, 3, dtype=torch.uint8)
    draw_photograph(atlas.Photograph("a$^$b.png", picture, [("a$^$c", 1.0)], layers)).draw_without_rendering()


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 2, 3], [5, 5, 5, 5]])
    b = torch.tensor([[1.0, 8, 27, 64], [4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4]])
    result = rank_correlation(a, b, torch.ones_like(a, dtype=torch.bool))
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert result[:3].tolist() == pytest.approx([1, -1, (4.5 / 5) ** 0.5])
    assert result[3].isnan()


def test_project_controls_of_a_random_network() -> None:
    model = network("pad")
    images = random_inputs(model, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    units = torch.tensor([[0, 1, 1, 1], [1, 2, 1, 1], [2, 3, 0, 1]])
    deconvnet = Deconvnet(model)
    controls = project_controls(deconvnet, images, "conv4", units)
    assert controls.keys() == {"own", *CONTROLS}
    assert project_controls(deconvnet, images, "conv1", units).keys() == {"own", *CONTROLS} - {
        "other_switches"  # there is no pooling below conv1
    }
    own = deconvnet.project(images, "conv4", units, seeds=torch.ones(3))
    assert torch.equal(controls.pop("own"), own)
    assert not torch.equal(*controls["random_weights"][:2])
    for other in (*controls["random_weights"], controls["other_switches"], controls["other_unit"]):
        assert other.abs().sum() > 0
        assert not torch.allclose(other, own)
    again = project_controls(deconvnet, images, "conv4", units)
    assert all(torch.equal(again[k], v) for k, v in controls.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_project_controls_take_the_switches_of_another_image() -> None:
    """The other image must differ, although units can share an image and a data set can contain an image twice."""
    model = network("pad")
    one, other = random_inputs(model, 2).split(1)
    units = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [2, 0, 1, 1], [0, 2, 1, 1]])
    deconvnet = Deconvnet(model)
    images = torch.cat([one, one, other])
    controls = project_controls(deconvnet, images, "conv4", units)
    swapped = torch.cat([other, other, one])
    expected = deconvnet.project(images, "conv4", units, seeds=torch.ones(4), switches_from=swapped)
    assert torch.equal(controls["other_switches"], expected)
    assert "other_switches" not in project_controls(deconvnet, torch.cat([one, one]), "conv4", units[:2])


def test_project_controls_take_another_unit_that_is_active_there() -> None:
    model = network("pad")
    images = random_inputs(model, 2)
    deconvnet = Deconvnet(model)
    active = model.activations(images, ["conv3"])["conv3"][0, :, 2, 2] > 0
    units = torch.tensor([[0, c, 2, 2] for c in range(len(active))])
    every = deconvnet.project(images, "conv3", units, seeds=torch.ones(len(units)))
    for seed in range(3):
        others = project_controls(deconvnet, images, "conv3", units, seed)["other_unit"]
        for channel, picture in enumerate(others):
            equal = [c for c in range(len(active)) if torch.allclose(every[c], picture)]
            assert equal
            assert all(active[c] and c != channel for c in equal)


def test_dead_window_sensitivity_above_and_below_a_pooling() -> None:
    model = network("pad")
    images = random_inputs(model, 2)
    strongest = {}
    for layer in ("conv1", "conv5"):
        maps = model.activations(images, [layer])[layer]
        strongest[layer] = (maps >= maps.amax()).nonzero()
    below = dead_window_sensitivity(Deconvnet(model), images, "conv1", strongest["conv1"])
    assert below == {choice: {"relative_change": 0, "cosine": pytest.approx(1)} for choice in ("mask", "all")}
    units = strongest["conv5"]
    above = dead_window_sensitivity(Deconvnet(model), images, "conv5", units)
    ours, other = (
        Deconvnet(model, dead_windows=choice).project(images, "conv5", units) for choice in ("first", "mask")
    )
    assert above["mask"]["relative_change"] == pytest.approx(((ours - other).norm() / ours.norm()).item())
    assert min(row["relative_change"] for row in above.values()) > 0.01
    silent = dead_window_sensitivity(Deconvnet(model), images, "conv5", units[:0])
    assert silent["mask"] == {"relative_change": None, "cosine": None}


WHOLE = torch.tensor([[0, 0, 5, 5]]).expand(4, 4)


def test_compare_controls_equal_and_constant_projections() -> None:
    own = torch.randn(4, 3, 5, 5)
    several = torch.stack([own, -own])
    controls = {"own": own, "same": own.clone(), "negated": -own, "empty": torch.zeros_like(own), "several": several}
    result = compare_controls(controls, WHOLE)
    assert result["same"]["signed"]["mean"] == pytest.approx(1)
    assert result["negated"]["signed"]["mean"] == pytest.approx(-1)
    assert result["negated"]["unsigned"]["mean"] == pytest.approx(1)
    assert result["several"]["signed"]["mean"] == pytest.approx(0)
    assert result["same"]["signed"]["n"] == 4
    assert result["empty"]["signed"] == {"n": 0, "mean": None, "std": None, "low": None, "high": None}


def test_compare_controls_ranks_within_what_the_unit_sees() -> None:
    """Zeros outside the image do not make independent pictures similar."""
    own, other = torch.randn(2, 4, 3, 40, 40)
    own[:, :, :20], other[:, :, :20] = 0, 0
    assert rank_correlation(own.abs(), other.abs(), torch.ones_like(own, dtype=torch.bool)).mean() > 0.5
    inside = torch.tensor([[20, 0, 40, 40]]).expand(4, 4)
    result = compare_controls({"own": own, "other": other}, inside)["other"]
    assert result["unsigned"]["mean"] == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("layer", ["conv2", "conv5"])
def test_inside_frames_hold_all_of_a_projection(layer: str) -> None:
    model = network("pad")
    images = random_inputs(model, 1)
    height, width = model.activations(images, [layer])[layer].shape[2:]
    units = torch.tensor([[0, 1, 0, 0], [0, 1, height - 1, width - 1], [0, 2, height // 2, 0]])
    frames = project_controls(Deconvnet(model), images, layer, units)["own"]
    for frame, (top, left, bottom, right) in zip(
        frames, inside_frames(model.chain, layer, units).tolist(), strict=True
    ):
        assert 0 <= top < bottom <= frame.shape[1]
        assert 0 <= left < right <= frame.shape[2]
        assert frame[:, top:bottom, left:right].abs().sum() == pytest.approx(frame.abs().sum().item())


def test_shuffle_weights_keeps_the_numbers() -> None:
    model = network("pad")
    twin = shuffle_weights(model.chain, "conv3").model
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    assert not torch.equal(model.conv3.weight, twin.conv3.weight)
    assert torch.equal(model.conv4.weight, twin.conv4.weight)


def test_shuffle_weights_of_a_parametrization_leaves_the_network_as_it_is() -> None:
    model = network("pad")
    nn.utils.parametrizations.weight_norm(model.conv2)
    weight, images = model.conv2.weight.detach().clone(), random_inputs(model)
    expected = model(images)
    for draw in (0, 1):
        twin = shuffle_weights(model.chain, "conv3", draw=draw).model
        assert torch.equal(twin.conv2.weight.flatten().sort().values, weight.flatten().sort().values)
        assert not torch.equal(twin.conv2.weight, weight)
        assert torch.equal(model.conv2.weight, weight)
        assert torch.equal(model(images), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_shuffle_weights_refuses_those_that_a_hook_computes(norm) -> None:
    model = network("pad")
    norm(model.conv2)
    model(random_inputs(model))
    with pytest.raises(UserError, match="conv2: a hook computes its weights"):
        shuffle_weights(model.chain, "conv3")


def test_draw_projections_left_patches_right_and_every_map_named() -> None:
    left = [torch.full((4, 7, 7, 3), 10 * n, dtype=torch.uint8) for n in (1, 2, 3)]
    right = [torch.full((4, 7, 7, 3), 100 + 10 * n, dtype=torch.uint8) for n in (1, 2, 3)]
    figure = draw_projections("conv9", [5, 17, 200], left, right)
    assert figure.get_suptitle() == "conv9"
    for axis, expected in zip(figure.axes, (left, right), strict=True):
        sheet = np.asarray(axis.images[0].get_array())
        assert [text.get_text() for text in axis.texts] == ["map 5", "map 17", "map 200"]
        for text, tiles in zip(axis.texts, expected, strict=True):
            x, y = text.get_position()
            below = sheet[int(y) + 20, int(x) - 20]
            assert (below == tiles[0, 0, 0].numpy()).all()
        shades = set(np.unique(sheet)) - {255}
        assert shades == {int(tiles[0, 0, 0, 0]) for tiles in expected}


def test_draw_controls_without_those_that_do_not_apply() -> None:
    row = {"n": 3, "mean": 0.5, "std": 0.1, "low": 0.4, "high": 0.6}
    both = {"signed": row, "unsigned": {**row, "mean": 0.7}}
    nothing = {"n": 0, "mean": None, "std": None, "low": None, "high": None}
    none = {"signed": nothing, "unsigned": nothing}
    figure = draw_controls(
        {
            "conv1": {"random_weights": both, "other_unit": none},
            "conv2": {"random_weights": both, "other_unit": both, "other_switches": both},
        }
    )
    for axis, expected in zip(figure.axes, (0.5, 0.7), strict=True):
        assert [bar.get_height() for bar in axis.patches] == [expected] * 4
        assert [list(line.get_ydata()) for line in axis.lines].count([0.4, 0.6]) == 4


# ---- the command

SMALL = (
    "job=deconvnet",
    "job.split=train",
    "job.max_images=60",
    "data.batch_size=4",
    "job.top=3",
    "job.maps=5",
    "job.layers=[conv1,conv4]",
    "job.sample=20",
    "job.ablation=3",
    "trainer.device=cpu",
)


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a job's results: all files except logs, times and the state of the search."""
    skipped = {"deconvnet.log", "status.json", ".lock", "search.safetensors"}
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in skipped and ".hydra" not in p.parts and p.name != "config.yaml"
    }


def save_photograph(path: Path) -> None:
    Image.fromarray(random_images(1, 40, seed=5)[0].numpy()).save(path)


@pytest.mark.drawn
def test_deconvnet_job_writes_all_and_continues_after_a_stop(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.analyses.deconvnet._CONTROL_UNITS", 8)  # faster
    few = ("model.conv1.channels=12", "model.conv4.channels=12", "trainer.epochs=1")
    own = train_tiny(tmp_path / "own", *few).folder
    before = files(own)
    judged = tmp_path / "outputs/verdict/1"  # found as the newest verdict of this network
    judged.mkdir(parents=True)
    weights = weights_hash(load_run(own).model.state_dict())
    (judged / "verdict.json").write_text(json.dumps({"weights": weights, "split": "test"}))
    (judged / "maps.csv").write_text("layer,map,method,measure,n,mean,se\nconv4,5,deconvnet,own,2,0.5,0.1\n")
    answer = run_py(*SMALL, f"run={own}", "hydra.run.dir=whole")
    assert (answer.code, answer.err) == (0, "")
    assert "60 train images" in answer.out
    assert files(own) == before
    whole = tmp_path / "whole"
    for name in ("controls", "deconvnet_conv1", "deconvnet_conv4"):
        assert (whole / f"figures/{name}.png").stat().st_size > 10_000
    assert (whole / "atlas/index.html").is_file()
    numbers = json.loads((whole / "atlas/atlas.json").read_text())
    layers = numbers["layers"]
    assert numbers["ablated"] == 3
    assert [m["scores"] for m in layers[1]["maps"][4:6]] == [{}, {"own": [0.5, 0.1, 2]}]

    # recompute every number of the table
    run = load_run(own)
    images, searched = load_splits(run.config.data).train, torch.linspace(0, 179, 60).round().long()
    inputs = preprocess(images.pixels(range(len(images))), run.config.data)
    for layer in ("conv1", "conv4"):
        activations = run.model.activations(inputs, [layer])[layer].detach()
        table = [r for r in read_csv(whole / "top_activations.csv") if r["layer"] == layer]
        assert len(table) > 20
        for row in table:
            n, c, y, x = (int(row[k]) for k in ("image", "map", "y", "x"))
            assert activations[n, c, y, x].item() == pytest.approx(float(row["activation"]), rel=1e-4)
            assert row["class"] == run.classes[images.labels[n]]
            box = tuple(int(row[k]) for k in ("top", "left", "bottom", "right"))
            assert box == receptive_box(run.model, layer, y, x)
        best = activations[searched].amax((2, 3)).sort(0, descending=True).values[:3]
        for row in table:
            expected = best[int(row["rank"]) - 1, int(row["map"])].item()
            assert float(row["activation"]) == pytest.approx(expected, rel=1e-4)
        drawn = load_file(whole / f"projections/{layer}.safetensors")
        assert len(drawn["units"][:, 1].unique()) == 5
        ours = Deconvnet(run.model).project(inputs, layer, drawn["units"])
        assert drawn["projections"].abs().sum().item() == pytest.approx(ours.abs().sum().item(), rel=1e-4)
    maps = read_csv(whole / "maps.csv")
    assert [r["layer"] for r in maps] == ["conv1"] * 12 + ["conv4"] * 12
    # the maps of a photograph link to this atlas
    save_photograph(tmp_path / "cat.png")
    words = ("images=[cat.png]", "job.maps=3", "job.pages=whole", "job.layers=[conv1,conv4]", "trainer.device=cpu")
    answer = run_py("job=deconvnet", f"run={own}", *words, "hydra.run.dir=photo")
    assert answer.code == 0, answer.err
    pixels = run.inputs("cat.png")
    rows = read_csv(tmp_path / "photo/strongest.csv")
    assert len(rows) == 6
    for row in rows:
        maps = run.model.activations(pixels, [row["layer"]])[row["layer"]][0].detach()
        best = maps.amax((1, 2)).sort(descending=True)
        assert int(row["map"]) == best.indices[int(row["rank"]) - 1]
        assert maps[int(row["map"]), int(row["y"]), int(row["x"])].item() == pytest.approx(
            float(row["activation"]), 1e-4
        )
    text = (tmp_path / "photo/index.html").read_text()
    links = [f"../whole/atlas/index.html#{row['layer']}/{row['map']}" for row in rows]
    assert re.findall(r'<a href="([^"]+)">', text) == links
    assert (tmp_path / "photo/figures/photograph_1.png").stat().st_size > 10_000
    assert read_csv(tmp_path / "photo/predictions.csv")[0]["predicted"] == next(iter(run.predict("cat.png")))
    answer = run_py("job=deconvnet", f"run={own}", "images=[cat.png]", "job.pages=.", "hydra.run.dir=y")
    assert answer.error == "job.pages=.: contains no atlas of this network"
    answer = run_py("job=deconvnet", f"run={own}", "images=[dog.png]", "hydra.run.dir=y")
    assert "dog.png" in answer.error
    assert json.loads((whole / "controls.json").read_text())["conv4"].keys() == {
        "random_weights",
        "other_switches",
        "other_unit",
    }

    # a job that is stopped during the search, then during the atlas, resumes and writes the same bytes
    with monkeypatch.context() as patch:
        add = TopActivations.add

        def stop_at_once(self, *batch) -> None:
            if self.images:
                raise Stopped(15)
            add(self, *batch)

        patch.setattr(TopActivations, "add", stop_at_once)
        patch.setattr("zfnet.analyses.deconvnet._SAVE_SECONDS", 0.0)
        assert run_py(*SMALL, f"run={own}", "hydra.run.dir=part").code == 143
    saved = tmp_path / "part/search.safetensors"
    content = saved.read_bytes()
    saved.write_bytes(content[:-1])
    answer = run_py(*SMALL, f"run={own}", "hydra.run.dir=part")
    assert answer.error.startswith("part/search.safetensors is damaged")
    assert answer.error.endswith(": delete it to search again")
    saved.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(atlas, "_thumbnail_sheet", lambda *_: (_ for _ in ()).throw(Stopped(15)))
        answer = run_py(*SMALL, f"run={own}", "hydra.run.dir=part")
        assert answer.code == 143
        assert "continuing after 4 images" in answer.out
    assert json.loads((tmp_path / "part/status.json").read_text())["state"] == "stopped"
    assert run_py(*SMALL, f"run={own}", "hydra.run.dir=part").code == 0
    assert files(tmp_path / "part") == files(whole)
    answer = run_py(*SMALL, f"run={own}", "hydra.run.dir=part")
    assert "nothing to do" in answer.out
    answer = run_py(*SMALL, f"run={own}", "hydra.run.dir=part", "job.top=2")
    assert answer.err == ("error: part was made with other settings: choose another directory (hydra.run.dir=…)\n")


def test_deconvnet_job_refuses_the_runs_own_directory(run_py, tiny_run) -> None:
    answer = run_py(*SMALL, f"run={tiny_run.folder}", f"hydra.run.dir={tiny_run.folder}")
    assert answer.code == 1
    assert "choose another directory" in answer.err


def test_verdict_of_other_pictures_is_refused(run_py, tiny_run) -> None:
    words = ("job=deconvnet", f"run={tiny_run.folder}", "job.dead_windows=all")
    assert "job.dead_windows=first" in run_py(*words, "job.verdict=v").error
