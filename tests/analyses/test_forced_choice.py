"""The forced choice: informed observers are always right, and uninformed observers half of the time."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.explain.browser import CHROMIUM, DRIVER, browser
from tests.helpers import data_config, read_csv
from zfnet.analyses import forced_choice
from zfnet.analyses.forced_choice import (
    CONDITIONS,
    PUBLISHED,
    Observer,
    TrialPictures,
    accuracies,
    choices,
    choose,
    compare_conditions,
    draw_forced_choice,
    draw_trials,
    quiz_trials,
    strongest_places,
    trial_rows,
)
from zfnet.config.errors import UserError
from zfnet.data import Batches
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet
from zfnet.explain.atlas import write_quiz
from zfnet.model.chain import Chain
from zfnet.runs.directory import RunDirectory
from zfnet.runs.weights import load_model, save_model

SIZE = 8


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"maps": 9, "references": 9, "trials": 10, "extreme": 0.1} | changes)


def colour_network(signs: Tensor) -> Chain:
    """Return a network in which each map of `a` is the mean of one colour over 3×3 px, times a sign, rectified."""
    model = nn.Sequential()
    model.add_module("a", nn.Conv2d(3, len(signs), 3, padding=1))
    model.add_module("relu", nn.ReLU())
    model.add_module("flat", nn.Flatten())
    model.add_module("b", nn.Linear(len(signs) * SIZE**2, 3))
    with torch.no_grad():
        model.a.weight.zero_()
        model.a.bias.zero_()
        for number, sign in enumerate(signs):
            model.a.weight[number, number % 3] = sign / 9
    return Chain(model.eval(), SIZE)


@pytest.fixture(scope="module")
def colours() -> TrialPictures:
    """Trials of a network with a map for red, green and blue each, on 400 images of a single colour each."""
    pixels = torch.randint(0, 256, (400, 1, 1, 3), dtype=torch.uint8, generator=generator())
    images = image_set(pixels.expand(-1, SIZE, SIZE, -1).numpy(), torch.zeros(400), ["one"])
    data = data_config(image_size=SIZE, batch_size=50, mean=[0.5] * 3, std=[0.5] * 3)
    chain = colour_network(torch.ones(3))
    found = strongest_places(chain, (b.images for b in Batches(images, data, torch.device("cpu")).in_order()), ["a"])
    trials = draw_trials(*found["a"], torch.arange(200), torch.arange(200, 400), settings(references=20), 0)
    return TrialPictures(Deconvnet(chain), images, data, "a", trials)


def test_maps_of_a_colour_are_predicted_by_a_network_with_colours(colours: TrialPictures) -> None:
    assert sorted(colours.trials.maps.tolist()) == [0, 1, 2]
    right = choices(colours, Observer(colour_network(torch.tensor([1.0, 1, 1, -1, -1, -1])), colours.data, ["a"]))
    assert right["patches"].eq(1).all()
    assert right["both"].mean() > 0.9
    assert abs(right["other_patches"].mean() - 0.5) < 0.25  # only thirty pairs of three maps
    rows = trial_rows("a", colours.trials, right)
    assert [row["patches"] for row in rows] == [1.0] * 30
    assert all(float(row["strong_activation"]) > float(row["weak_activation"]) for row in rows)


def test_observer_refuses_features_that_are_not_finite(colours: TrialPictures) -> None:
    diverged = colour_network(torch.tensor([1.0, torch.nan]))
    with pytest.raises(UserError, match=r"^job\.other: a of that network is not finite"):
        choices(colours, Observer(diverged, colours.data, ["a"]))


def test_observer_takes_some_pictures_at_a_time(colours: TrialPictures, monkeypatch: pytest.MonkeyPatch) -> None:
    observer, pictures = (
        Observer(colour_network(torch.ones(3)), colours.data, ["a", "b"]),
        colours.references(0)["patches"],
    )
    whole = observer.features(pictures)
    assert [whole[layer].shape for layer in ("a", "b")] == [(20, 27), (20, 3)]
    monkeypatch.setattr(forced_choice, "_PICTURES_AT_ONCE", 3)
    for layer, values in observer.features(pictures).items():
        torch.testing.assert_close(values, whole[layer])


def test_shown_pictures_are_what_the_units_see(colours: TrialPictures) -> None:
    queries, units = colours.queries(1), colours.trials.queries[1]
    assert queries.shape == (10, 2, 3, 3, 3)
    for pair, of in zip(queries, units, strict=True):
        for shown, (image, *_) in zip(pair, of.tolist(), strict=True):
            colour = torch.from_numpy(colours.images.images[image, 0, 0])
            assert (shown[1, 1].int() - colour.int()).abs().max() <= 1
    assert colours.references(1)["projections"].shape == (20, 3, 3, 3)


def test_draw_trials_keeps_references_and_queries_apart() -> None:
    values = torch.rand(300, 6, generator=generator())
    values[:, 1] = 0  # never active
    values[19::2, 2] = 0  # active in nine images for queries, too few for ten trials
    values[torch.arange(300) % 7 != 0, 3] = 0  # active in few images, and 0 in the weakest tenth
    places = torch.randint(0, 5, (300, 6, 2), generator=generator())
    first, second = torch.arange(300).view(150, 2).T
    trials = draw_trials(values, places, first, second, settings(), 0)
    assert sorted(trials.maps.tolist()) == [0, 3, 4, 5]
    for place, number in enumerate(trials.maps.tolist()):
        references, queries = trials.references[place], trials.queries[place]
        best = values[first, number].topk(9)
        assert references[:, 0].tolist() == first[best.indices].tolist()
        assert set(queries[..., 0].flatten().tolist()) <= set(second.tolist())
        strong, weak = queries.unbind(1)
        assert len(strong[:, 0].unique()) == len(weak[:, 0].unique()) == 10
        assert torch.equal(strong[:, 1:], weak[:, 1:])  # same position, so that the image's border gives no hint
        assert torch.equal(strong[:, 2:], places[strong[:, 0], number])
        assert torch.equal(trials.values[place, :, 0], values[strong[:, 0], number])
        ranked = values[second, number].sort().values
        assert trials.values[place, :, 0].min() >= ranked[-15]
        assert trials.values[place, :, 1].max() <= ranked[14]
    again = draw_trials(values, places, first, second, settings(), 0)
    assert torch.equal(again.queries, trials.queries)
    assert not torch.equal(draw_trials(values, places, first, second, settings(), 1).queries[0], trials.queries[0])
    assert len(draw_trials(values, places, first, second, settings(maps=2), 0).maps) == 2


@pytest.fixture
def features() -> dict[str, dict[str, Tensor]]:
    """Features of 40 maps, each with its own direction. Strong queries and patches contain it, projections do not."""
    own, numbers = torch.eye(40), generator()
    found = {
        "projections": torch.randn(40, 9, 40, generator=numbers),  # uninformative
        "patches": 3 * own[:, None] + 0.1 * torch.randn(40, 9, 40, generator=numbers),
        "queries": 0.2 * torch.randn(40, 20, 40, generator=numbers),
    }
    found["queries"][:, ::2] += own[:, None]
    return {kind: {"layer": values} for kind, values in found.items()}


def test_choose_is_right_by_informative_pictures_and_at_chance_by_others(features) -> None:
    right = choose(features)
    assert right.keys() == CONDITIONS.keys()
    assert right["patches"].shape == (40, 10)
    assert right["patches"].mean() > 0.99
    for name in ("projections", "other_projections", "other_patches"):
        assert abs(right[name].mean() - 0.5) < 3 * 0.5 / 400**0.5


def test_choose_answers_the_other_way_when_the_queries_are_swapped(features) -> None:
    right = choose(features)
    swapped = features["queries"]["layer"].unflatten(1, (-1, 2)).flip(2).flatten(1, 2)
    other = choose(features | {"queries": {"layer": swapped}})
    for name in CONDITIONS:
        assert torch.equal(other[name], 1 - right[name])


def test_choose_between_equal_pictures_is_half_right(features) -> None:
    blank = torch.full_like(features["projections"]["layer"], 0.25)
    right = choose(features | {"projections": {"layer": blank}})
    assert right["projections"].eq(0.5).all()
    assert right["other_projections"].eq(0.5).all()
    assert torch.equal(right["both"], right["patches"])


def test_errors_are_those_of_maps_and_tests_are_paired() -> None:
    """Each of four maps is right in all its trials or in none, so that n is 4 and not 40."""
    rows = []
    for layer in ("a", "b"):
        for number in range(4):
            known = float(number < 3)
            values = {
                "projections": known,
                "patches": 1.0,
                "both": known,
                "other_projections": 0.5,
                "other_patches": 0.5,
            }
            rows += [{"layer": layer, "map": number, **values} for _ in range(10)]
    table = {(row["layer"], row["condition"]): row for row in accuracies(rows)}
    assert list(dict.fromkeys(layer for layer, _ in table)) == ["a", "b", "all"]
    one = table["a", "projections"]
    assert (one["accuracy"], one["se"]) == (0.75, pytest.approx(0.25))  # √(0.75 · 0.25 / 3)
    assert (one["trials"], one["maps"], table["all", "patches"]["maps"]) == (40, 4, 8)
    assert table["a", "patches"]["se"] == 0
    found = {(row["layer"], row["first"], row["second"]): row for row in compare_conditions(rows)}
    difference = found["a", "patches", "projections"]
    assert (difference["difference"], difference["se"]) == (0.25, pytest.approx(0.25))
    assert difference["p"] == pytest.approx(0.391, abs=1e-3)  # t = 1 with three degrees of freedom
    assert difference["p_holm"] >= difference["p"]
    assert found["a", "patches", "chance"]["p"] == 0.125  # four maps, always right
    assert ("a", "both", "projections") not in found  # there is no difference to test


def test_figure_shows_every_accuracy() -> None:
    table = [
        {"layer": "a", "condition": name, "accuracy": 0.05 + number / 5, "se": None, "trials": 4, "maps": 1}
        for number, name in enumerate(CONDITIONS)
    ]
    axis = draw_forced_choice(table).axes[0]
    shown = [y for line in axis.lines for y in line.get_ydata()]
    low, high = axis.get_ylim()
    assert low < min(shown) == pytest.approx(5)
    assert max(shown) < high


# ---- the quiz


def test_quiz_trials_know_the_answer_and_come_from_different_maps(colours: TrialPictures) -> None:
    trials = quiz_trials(colours, 3, key=0)
    assert [t["condition"] for t in trials[::3]] == list(CONDITIONS)
    assert {t["answer"] for t in trials} == {0, 1}
    for trial in trials:
        assert trial["values"][trial["answer"]] > trial["values"][1 - trial["answer"]]
        colour = [int(query[1, 1, trial["map"]]) for query in trial["queries"]]
        assert colour[trial["answer"]] > colour[1 - trial["answer"]]
        assert [kind for kind, _ in trial["references"]] == list(CONDITIONS[trial["condition"]][0])
    for condition in CONDITIONS:
        assert len({t["map"] for t in trials if t["condition"] == condition}) == 3
    shades = [dict(t["references"])["patches"].mean((0, 1)).argmax() == t["map"] for t in trials[3:6] + trials[12:]]
    assert shades == [True] * 3 + [False] * 3  # own map, then another map


@pytest.fixture
def page(colours: TrialPictures, tmp_path: Path) -> Path:
    about = {"title": "tiny <net>", "weights": "abc", "layers": ["a", "z"], "split": "test", "published": PUBLISHED}
    about |= {"conditions": dict.fromkeys(CONDITIONS, "</script><b>")}
    return write_quiz(tmp_path, quiz_trials(colours, 2, key=0), about)


def test_quiz_fetches_nothing_and_its_tooltips_tell_nothing(page: Path) -> None:
    text = re.sub(r"data:image/webp;base64,[\w/+=]+", "", page.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|//\w|<link(?! rel=\"icon\" href=\"data:,\")|@import| title=", text)
    assert text.count("</script>") == 2
    assert [p.name for p in page.parent.iterdir()] == ["quiz.html"]


ENTER_ON_A_LINK = """const press = new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true});
return document.getElementById('save').dispatchEvent(press)"""


def test_a_quiz_is_linked_from_an_atlas_whose_page_is_no_text(page: Path, colours: TrialPictures) -> None:
    atlas = page.with_name("atlas.html")
    atlas.write_bytes(b'\xff<a id="quiz" href="quiz.html" hidden>')
    about = {"title": "", "weights": "abc", "layers": ["a"], "split": "test", "published": [], "conditions": {}}
    write_quiz(page.parent / "nowhere", quiz_trials(colours, 1, key=0), about, atlas)
    assert atlas.read_bytes() == b'\xff<a id="quiz" href="quiz.html">'


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_quiz_in_a_browser(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    trials = json.loads(re.search(r'id="metadata">(.*?)</script>', text, re.S)[1])["trials"]
    with browser(tmp_path / "profile") as b:

        def read(name: str) -> str:
            return b.run(f"return document.getElementById('{name}').textContent")

        b.open(page)
        b.wait("[...document.images].every((i) => i.complete && i.naturalWidth)")
        before = b.run("return document.querySelector('main').innerHTML")
        assert not [name for name in CONDITIONS if name.startswith("other") and name in before]
        given = []
        for number, trial in enumerate(trials):
            assert read("number").startswith(f"Question {number + 1} of 10")
            assert read("answer") == ""
            choice = trial["answer"] if number != 2 else 1 - trial["answer"]
            b.press(["\ue012", "\ue014"][choice] if number % 2 else "12"[choice])
            assert read("answer").startswith("Wrong" if number == 2 else "Right")
            b.press("1")  # a second answer is ignored
            given.append(choice)
            if number == 3:  # a page that is opened again resumes
                b.open(page)
                b.wait("document.getElementById('number').textContent.startsWith('Question 5')")
            else:
                assert b.run(ENTER_ON_A_LINK)  # the page must not prevent the default action
                assert read("answer")
                b.press("\ue006")  # enter
        assert read("number").startswith("All 10 questions")
        assert b.run("return document.getElementById('trial').offsetHeight") == 0  # no gap above the score
        assert read("score").count("50 ± 50 (2)") == 2  # for the layer, and for all
        assert read("score").count("100 ± 0 (2)") == 8
        assert "92 ± 2" in read("published")
        saved = json.loads(unquote(b.run("return document.getElementById('save').href").partition(",")[2]))
        assert [(a["choice"], a["right"]) for a in saved["answers"]] == [(c, n != 2) for n, c in enumerate(given)]
        assert {a["condition"] for a in saved["answers"]} == CONDITIONS.keys()
        b.run("document.getElementById('again').click()")
        b.wait("document.getElementById('number').textContent.startsWith('Question 1 of')")
        assert not b.messages()


# ---- the job


@pytest.fixture(scope="module")
def other_run(tiny_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny run with shuffled weights, in place of a run with another seed."""
    folder = tmp_path_factory.mktemp("other") / "run"
    shutil.copytree(tiny_run.folder, folder)
    model, metadata = load_model(tiny_run.weights)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.flatten()[torch.randperm(value.numel(), generator=generator())].view_as(value))
    (folder / "results.json").unlink()
    save_model(folder / "model.safetensors", model, metadata)
    return folder


def test_the_table_of_many_layers_is_at_most_80_columns_wide() -> None:
    names = [f"block{n}.convolution" for n in range(8)]
    table = [{"layer": n, "condition": c, "accuracy": 1.0, "se": 0.25} for n in names for c in CONDITIONS]
    lines = forced_choice._table_lines(table)
    assert max(map(len, lines)) <= 80
    assert [line.split().count("100±25") for line in lines if line.startswith("both")] == [6, 2]


WORDS = ("job=forced_choice", "job.split=train", "trainer.threads=1", "hydra.run.dir=out")


@pytest.mark.drawn
def test_forced_choice_job_writes_all(run_py, tiny_run: RunDirectory, other_run: Path) -> None:
    words = (f"run={tiny_run.folder}", f"job.other={other_run}", "job.layers=[conv1,conv5]")
    answer = run_py(*WORDS, *words, "job.maps=3", "job.trials=3", "job.quiz=1")
    assert answer.code == 0, answer.err
    assert "people, natural images    92±2" in answer.out
    assert max(map(len, answer.out.splitlines()[2:-2])) <= 80
    rows, record = read_csv(Path("out/forced_choice.csv")), json.loads(Path("out/forced_choice.json").read_text())
    assert len(rows) == 2 * 3 * 3
    of = {(row["layer"], row["condition"]): row for row in record["accuracy"]}
    assert len(of) == 3 * len(CONDITIONS)
    mean = sum(float(row["both"]) for row in rows) / len(rows)
    assert of["all", "both"]["accuracy"] == pytest.approx(mean)
    assert record["published"] == PUBLISHED
    assert Image.open("out/figures/forced_choice.png").width > 500
    quiz = json.loads(re.search(r'id="metadata">(.*?)</script>', Path("out/quiz.html").read_text(), re.S)[1])
    assert len(quiz["trials"]) == 2 * len(CONDITIONS)
    assert [t["condition"] for t in quiz["trials"]] != list(CONDITIONS) * 2  # shuffled
    assert quiz["atlas"] is None


@pytest.mark.parametrize("kind", ["true", "single"])
def test_the_quiz_becomes_a_page_of_the_atlas(run_py, tiny_run: RunDirectory, other_run: Path, kind: str) -> None:
    few = (f"run={tiny_run.folder}", "job.layers=[conv5]", "job.maps=2")
    words = ("job=deconvnet", *few, "job.top=1", "job.sample=2", "job.ablation=0", "job.controls=false")
    answer = run_py(*words, f"job.atlas={kind}", "hydra.run.dir=outputs/deconvnet/1")
    assert answer.code == 0, answer.err
    folder = Path("outputs/deconvnet/1")
    page = folder / ("atlas/index.html" if kind == "true" else "atlas.html")
    before = page.read_text()
    assert len(re.findall(r'<a id="quiz" href="quiz.html" hidden>', before)) == 1
    answer = run_py(*WORDS, f"job.other={other_run}", *few, "job.trials=1", "job.quiz=1")
    assert answer.code == 0, answer.err
    assert page.read_text() == before.replace('href="quiz.html" hidden', 'href="quiz.html"')
    quiz = json.loads(re.search(r'id="metadata">(.*?)</script>', page.with_name("quiz.html").read_text(), re.S)[1])
    assert page.with_name(quiz["atlas"]) == page
    assert not Path("out/quiz.html").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "job.other is not set: name a run that was trained independently"),
        (["job.other=SAME"], "has the same weights as run="),
        (["job.other=nowhere"], "job.other=nowhere: there is no run"),
        (["job.other=OTHER", "job.layers=[fc6]"], "job.layers=fc6: the network has no such convolution"),
        (["job.other=OTHER", "job.features=[conv9]"], "job.features=conv9: the network has no such layer"),
        (["job.other=OTHER", "job.split=validation"], "job.trials=10: needs 200 validation images"),
        (["job.other=OTHER", "job.references=100", "job.trials=1"], "job.references=100: needs 200 "),
        (["job.other=OTHER", "job.extreme=0.6"], "job.extreme=0.6: must be at most 0.5"),
        (["job.other=OTHER", "job.trials=3", "job.pages=nowhere"], "job.pages=nowhere: contains no atlas of this"),
    ],
)
def test_forced_choice_refuses_bad_input_in_one_line(
    run_py, tiny_run: RunDirectory, other_run: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    words = [w.replace("SAME", str(tiny_run.folder)).replace("OTHER", str(other_run)) for w in words]
    answer = run_py(*WORDS, f"run={tiny_run.folder}", *words)
    assert expected in answer.error
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_maps_that_are_seldom_active_are_an_error(run_py, tiny_run, other_run: Path, monkeypatch) -> None:
    def nothing(chain, batches, layers):
        return {layer: (torch.zeros(180, 4), torch.zeros(180, 4, 2, dtype=torch.int64)) for layer in layers}

    monkeypatch.setattr(forced_choice, "strongest_places", nothing)
    answer = run_py(*WORDS, f"run={tiny_run.folder}", f"job.other={other_run}", "job.trials=3", "job.layers=[conv2]")
    assert answer.code == 1
    assert "job.layers: none of conv2 has two maps that are active in enough images" in answer.err


def test_a_layer_whose_maps_are_seldom_active_is_left_out(run_py, tiny_run, other_run: Path, monkeypatch) -> None:
    real = forced_choice.strongest_places

    def some(chain, batches, layers):
        return {k: (v * (k != "conv2"), place) for k, (v, place) in real(chain, batches, layers).items()}

    monkeypatch.setattr(forced_choice, "strongest_places", some)
    words = ("job.layers=[conv1,conv2]", "job.maps=2", "job.trials=1", "job.quiz=1")
    answer = run_py(*WORDS, f"run={tiny_run.folder}", f"job.other={other_run}", *words)
    assert answer.code == 0, answer.err
    assert "conv2: no two maps are active in enough images, so it is left out" in answer.out
    assert '"layers":["conv1"]' in Path("out/quiz.html").read_text()
