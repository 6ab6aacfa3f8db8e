"""job=forced_choice: can an observer predict, from pictures of a feature map, which of two other images excites it
more?

Borowski et al. (2021) asked people this question. Zimmermann et al. (2024) let a machine choose by the similarity of
the pictures. Here the pictures are the deconvnet's projections and their image patches, the machine is another network,
and the control shows pictures of another map of the layer. docs/verdict.md describes the protocol.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log
from zfnet.config.randomness import CONTROL, make_key, permutation, random_bits
from zfnet.config.schema import Config, DataConfig, Positive, model_name
from zfnet.data import ImageSet, preprocess
from zfnet.data.batches import resize
from zfnet.explain.atlas import find_atlas, write_quiz
from zfnet.explain.crops import frame_size, view_units
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import strongest_places
from zfnet.explain.selection import Look, chosen_split, load_other, pick_layers
from zfnet.model.chain import Chain
from zfnet.model.layers import full_precision
from zfnet.plots.figures import INK, PALETTE, SOFT, WHITE, new_figure, save_figure, styled
from zfnet.plots.pictures import mosaic, on_grey
from zfnet.runs.session import own_directory
from zfnet.runs.statistics import clustered_mean, clustered_tests
from zfnet.runs.tables import shorten, to_rows
from zfnet.runs.weights import weights_hash
from zfnet.training.loaded import LoadedRun

ALL = "all"  # all layers together
CHANCE = "chance"
# condition → the kinds of pictures that are shown, and whether they are of another map
CONDITIONS: dict[str, tuple[tuple[str, ...], bool]] = {
    "projections": (("projections",), False),
    "patches": (("patches",), False),
    "both": (("projections", "patches"), False),
    "other_projections": (("projections",), True),
    "other_patches": (("patches",), True),
}
NAMES = {"other_projections": "another map's projections", "other_patches": "another map's patches"}
PAIRS = [
    ("projections", "other_projections"),
    ("patches", "other_patches"),
    ("patches", "projections"),
    ("both", "patches"),
    ("both", "projections"),
]
_REGIONS = 3  # regions along each side of a map, so that features keep rough positions
_PICTURES_AT_ONCE = 128  # on the device
_QUIZ_SIDE = 128  # largest side in pixels of a picture in the quiz
# results of people, for other images and another network (GoogLeNet, ImageNet): Borowski et al. 2021
PUBLISHED: list[dict[str, Any]] = [
    {"name": "people, natural images", "accuracy": 0.92, "error": 0.02, "source": "Borowski et al., ICLR 2021"},
    {"name": "people, synthetic images", "accuracy": 0.82, "error": 0.04, "source": "Borowski et al., ICLR 2021"},
]


@dataclass(kw_only=True)
class ForcedChoiceJob(Look):
    """See conf/job/forced_choice.yaml."""

    other: Optional[str]
    layers: Optional[list[str]]
    features: Optional[list[str]]
    maps: Annotated[int, Field(ge=2)]
    references: Annotated[int, Field(ge=1, le=100)]
    trials: Positive
    extreme: Annotated[float, Field(gt=0, le=0.5)]
    quiz: Annotated[int, Field(ge=0, le=100)]
    pages: Optional[str]

    def main(self, config: Config, output: Path) -> None:
        """Let the network `job.other` choose for the maps of `run=…`; write results to `output`, which must be new."""
        loaded = LoadedRun(config)
        chain, deconvnet, weights = loaded.chain, Deconvnet(loaded.chain), weights_hash(loaded.model.state_dict())
        layers = pick_layers(chain, "job.layers", self.layers, chain.conv_layers, only_conv=True)
        for layer in layers:
            deconvnet.check(layer)
        whole = [layer for layer in layers if frame_size(chain, layer) == chain.image_size]
        observer = self._observer(config, loaded, weights)
        page = find_atlas(weights, self.pages) if self.quiz else None
        split = chosen_split(loaded)
        images = split.images
        self._check_count(len(images), split.name)
        order = permutation(make_key(config.seed, CONTROL, 30), len(images))
        first, second = order[: len(images) // 2], order[len(images) // 2 :]
        with own_directory(config, output) as run:
            named = ", ".join(layers)
            log.info("%s: %s; the choice is by %s", loaded.source.folder, named, self.other)
            if whole:
                log.info("%s: the receptive field is larger than the image; units see all of it", ", ".join(whole))
            batches = loaded.batches(images)
            bar = tqdm(batches.in_order(), "strongest places", len(batches), unit="batch", disable=None, leave=False)
            strongest = strongest_places(chain, (batch.images for batch in bar), layers)
            rows: list[dict[str, Any]] = []
            quiz: list[dict[str, Any]] = []
            for number, layer in enumerate(layers):
                key = make_key(config.seed, CONTROL, 31, number)
                trials = draw_trials(*strongest[layer], first, second, self, key)
                if len(trials.maps) < 2:
                    log.info("%s: no two maps are active in enough images, so it is left out", layer)
                    continue
                shown = TrialPictures(deconvnet, images, loaded.data, layer, trials)
                rows += trial_rows(layer, trials, choices(shown, observer))
                quiz += quiz_trials(shown, self.quiz, key)
            if not rows:
                raise UserError(f"job.layers: none of {named} has two maps that are active in enough images")
            table, differences = accuracies(rows), compare_conditions(rows)
            run.write_csv("forced_choice.csv", rows)
            origin = {"run": str(loaded.source.folder), "weights": weights, "other": self.other, "split": split.name}
            numbers = {"accuracy": table, "differences": differences, "published": PUBLISHED}
            run.write_json("forced_choice.json", {**origin, **numbers})
            save_figure(draw_forced_choice(table), run.figures / "forced_choice.png")
            log.info("\n".join([*_table_lines(table), *_test_lines(differences)]))
            if quiz:
                quiz = [quiz[n] for n in permutation(make_key(config.seed, CONTROL, 32), len(quiz)).tolist()]
                title = f"{model_name(loaded.metadata.model)} on {config.data.title}"
                asked = list(dict.fromkeys(row["layer"] for row in rows))
                about: dict[str, Any] = {"title": title, "weights": weights, "layers": asked, "split": split.name}
                about |= {"conditions": {name: NAMES.get(name, name) for name in CONDITIONS}, "published": PUBLISHED}
                path = write_quiz(run.folder, quiz, about, page)
                log.info("try it yourself: open %s in a browser", path)

    def _observer(self, config: Config, loaded: LoadedRun, weights: str) -> "Observer":
        """Load the network `job.other`, which must not have the run's `weights`; raise UserError."""
        if self.other is None:
            raise UserError(
                "job.other is not set: name a run that was trained independently, such as with another seed"
            )
        chain, metadata = load_other(self.other, loaded)
        if weights_hash(chain.model.state_dict()) == weights:
            raise UserError(
                f"job.other={self.other}: has the same weights as run={config.run}; the observer must be another one"
            )
        return Observer(chain, metadata.data, pick_layers(chain, "job.features", self.features, chain.conv_layers))

    def _check_count(self, count: int, split: str) -> None:
        """Raise UserError if `count` images are too few."""
        for name, needed, advice in (
            (f"job.references={self.references}", 2 * self.references, "fewer"),
            (f"job.trials={self.trials}", 2 * math.ceil(self.trials / self.extreme), "fewer, or a larger job.extreme"),
        ):
            if needed > count:
                raise UserError(
                    f"{name}: needs {needed} {split} images, there are {count} (half for references, of the "
                    f"rest the fraction {self.extreme:g} for each side of a pair): try another job.split, or {advice}"
                )


# ---- trials


@dataclass(frozen=True)
class Trials:
    """T pairs of queries for each of M maps of a layer, and the R references of each map.

    maps: int64 [M]; references: int64 [M, R, 4], units (image, map, y, x), strongest first
    queries: int64 [M, T, 2, 4], units in the strong and the weak image, both at the strong image's strongest position
    values: [M, T, 2], the map's strongest activation in the whole image of each query
    """

    maps: Tensor
    references: Tensor
    queries: Tensor
    values: Tensor


def draw_trials(
    values: Tensor, places: Tensor, first: Tensor, second: Tensor, job: ForcedChoiceJob, key: int
) -> Trials:
    """Draw up to `job.maps` maps, with references from the images `first` and queries from the images `second`.

    values [N, C], places [N, C, 2]: see `strongest_places`. A map is used if it is active in all its references, and if
    at least `job.trials` images of the strongest tenth (`job.extreme`) excite it more than all of the weakest tenth.
    These are its possible strong queries; the weak ones are drawn from the weakest tenth. Ties are broken at random.
    """
    tenth = round(job.extreme * len(second))
    drawn = []
    for number in permutation(make_key(key, 0), values.shape[1]).tolist():
        best = first[values[first, number].argsort(descending=True, stable=True)[: job.references]]
        mixed = second[permutation(make_key(key, 1, number), len(second))]
        order = mixed[values[mixed, number].argsort(descending=True, stable=True)]
        strong, weak = order[:tenth], order[-tenth:]
        strong = strong[values[strong, number] > values[weak, number].amax().clamp(min=0)]
        if not bool((values[best, number] > 0).all()) or len(strong) < job.trials:
            continue
        strong = strong[permutation(make_key(key, 2, number), len(strong))[: job.trials]]
        weak = weak[permutation(make_key(key, 3, number), len(weak))[: job.trials]]
        pairs = torch.stack((strong, weak), 1)
        references = _units(best, number, places[best, number])
        queries = _units(pairs, number, places[strong, number][:, None].expand(-1, 2, -1))
        drawn.append((torch.tensor(number), references, queries, values[pairs, number]))
        if len(drawn) == job.maps:
            break
    if not drawn:
        return Trials(*[torch.zeros(0, dtype=torch.int64)] * 4)
    return Trials(*map(torch.stack, zip(*drawn, strict=True)))


def _units(images: Tensor, number: int, places: Tensor) -> Tensor:
    return torch.cat((images[..., None], torch.full_like(images, number)[..., None], places), -1)


@dataclass(frozen=True)
class TrialPictures:
    """The trials of a layer as pictures, uint8 [n, s, s, 3]; s is the side of the frame that a unit sees."""

    deconvnet: Deconvnet
    images: ImageSet
    data: DataConfig
    layer: str
    trials: Trials

    def references(self, place: int) -> dict[str, Tensor]:
        """Return the projections and the patches of the map at `place` in the trials, [R, s, s, 3] each."""
        units = self.trials.references[place]
        projections, patches = view_units(self.deconvnet, self.images, self.data, self.layer, units)
        return {"projections": on_grey(projections), "patches": patches}

    def queries(self, place: int) -> Tensor:
        """Return the queries of the map at `place` in the trials: [T, 2, s, s, 3]."""
        units = self.trials.queries[place]
        patches = view_units(self.deconvnet, self.images, self.data, self.layer, units.flatten(0, 1), project=False)[1]
        return patches.unflatten(0, units.shape[:2])


# ---- the observer


class Observer:
    """A network that compares pictures by its features: the maps of its layers, averaged over 3×3 regions."""

    def __init__(self, chain: Chain, data: DataConfig, layers: Sequence[str]) -> None:
        self.chain, self.layers = chain, layers
        self.data = replace(data, crop_size=None)  # the observer sees whole pictures
        self.device = next(chain.model.parameters()).device

    @torch.no_grad()
    @full_precision()
    def features(self, pictures: Tensor) -> dict[str, Tensor]:
        """Return each layer's features of pictures, uint8 [n, s, s, 3]: [n, 9 · channels], or [n, features] if linear.

        Raises UserError if a feature is not finite, because every choice would then be half right, as if by chance.
        """
        batches: dict[str, list[Tensor]] = {layer: [] for layer in self.layers}
        for part in pictures.split(_PICTURES_AT_ONCE):
            inputs = preprocess(part.to(self.device), self.data, channels_last=False)
            for layer, maps in self.chain.activations(inputs, self.layers).items():
                pooled = F.adaptive_avg_pool2d(maps, _REGIONS) if maps.ndim > 2 else maps
                batches[layer].append(pooled.flatten(1).cpu())
        features = {layer: torch.cat(parts) for layer, parts in batches.items()}
        for layer, values in features.items():
            if not bool(values.isfinite().all()):
                raise UserError(
                    f"job.other: {layer} of that network is not finite (NaN or infinite); choose another run"
                )
        return features


def choices(shown: TrialPictures, observer: Observer) -> dict[str, Tensor]:
    """Return for each condition whether each choice is right, [M, T]: 1 or 0, or 0.5 for equal similarities."""
    features: dict[str, list[dict[str, Tensor]]] = {"projections": [], "patches": [], "queries": []}
    count = len(shown.trials.maps)
    for place in tqdm(range(count), f"choices: {shown.layer}", unit="map", disable=None, leave=False):
        for kind, pictures in shown.references(place).items():
            features[kind].append(observer.features(pictures))
        features["queries"].append(observer.features(shown.queries(place).flatten(0, 1)))
    stacked = {
        kind: {layer: torch.stack([of[layer] for of in every]) for layer in observer.layers}
        for kind, every in features.items()
    }
    return choose(stacked)


def choose(features: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Choose, in each condition, the query with features more similar to those of the references; see `choices`.

    features: for `projections` and `patches` [M, R, D], for `queries` [M, 2·T, D], by layer of the observer. The
    similarity is the cosine of centred features, averaged over references and layers. Features are centred by the mean
    over all pictures of their kind (projections; patches and queries), because what all pictures share is no evidence.
    """
    similar: dict[str, Tensor] = {}
    for layer, queries in features["queries"].items():
        patches = features["patches"][layer]
        natural = torch.cat((queries.flatten(0, 1), patches.flatten(0, 1))).mean(0)
        asked = F.normalize(queries - natural, dim=-1)
        for kind, mean in (("patches", natural), ("projections", features["projections"][layer].mean((0, 1)))):
            own = F.normalize(features[kind][layer] - mean, dim=-1).mean(1)
            for name, shown in ((kind, own), (f"other_{kind}", own.roll(-1, 0))):
                value = (asked * shown[:, None]).sum(-1).unflatten(1, (-1, 2))
                similar[name] = similar.get(name, 0) + value
    similar["both"] = similar["projections"] + similar["patches"]
    return {name: 0.5 + 0.5 * (similar[name][..., 0] - similar[name][..., 1]).sign() for name in CONDITIONS}


# ---- the report


def trial_rows(layer: str, trials: Trials, right: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Return one row for each trial: its queries, and whether the choice is right in each condition."""
    count, each = right["both"].shape
    strong, weak = trials.queries.flatten(0, 1).unbind(1)
    values = trials.values.flatten(0, 1)
    return to_rows(
        layer=[layer] * len(strong),
        map=strong[:, 1].tolist(),
        trial=list(range(1, each + 1)) * count,
        strong=strong[:, 0].tolist(),
        weak=weak[:, 0].tolist(),
        y=strong[:, 2].tolist(),
        x=strong[:, 3].tolist(),
        strong_activation=[f"{v:.6g}" for v in values[:, 0].tolist()],
        weak_activation=[f"{v:.6g}" for v in values[:, 1].tolist()],
        **{name: right[name].flatten().tolist() for name in CONDITIONS},
    )


def _targets(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """Return for each layer, and for all together, the values by condition and the map of each value (its cluster)."""
    names = list(dict.fromkeys(row["layer"] for row in rows))
    targets = {}
    for target in [*names, ALL] if len(names) > 1 else names:
        of = [row for row in rows if target in (ALL, row["layer"])]
        known = {pair: n for n, pair in enumerate(dict.fromkeys((row["layer"], row["map"]) for row in of))}
        values = {name: torch.tensor([row[name] for row in of]).double() for name in CONDITIONS}
        targets[target] = values, torch.tensor([known[row["layer"], row["map"]] for row in of])
    return targets


def accuracies(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the accuracy of each layer and condition, with standard errors that are clustered by map."""
    table = []
    for target, (values, maps) in _targets(rows).items():
        for name in CONDITIONS:
            row, named = clustered_mean(values[name], maps), {"layer": target, "condition": name}
            numbers = {"accuracy": row["mean"], "se": row["se"], "trials": row["n"], "maps": row["clusters"]}
            table.append(named | numbers)
    return table


def compare_conditions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Test each condition against chance, and the pairs of PAIRS, in each layer and clustered by map."""
    tests = []
    for target, (values, maps) in _targets(rows).items():
        pairs = [*((name, CHANCE) for name in CONDITIONS), *PAIRS]
        differences = clustered_tests({**values, CHANCE: torch.tensor(0.5)}, maps, pairs)
        tests += [{"layer": target, **row} for row in differences]
    return tests


def _table_lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table in the log, at most 80 columns wide."""
    cells: dict[str, dict[str, str]] = {}  # layer → condition → text
    for row in table:
        error = "" if row["se"] is None else f"±{100 * row['se']:.0f}"
        cells.setdefault(row["layer"], {})[row["condition"]] = f"{100 * row['accuracy']:.0f}{error}"
    lines = ["right choices in percent ± standard error (by maps); 50 is chance"]
    for start in range(0, len(cells), 6):  # six layers fit side by side
        layers = list(cells)[start : start + 6]
        lines.append(f"{'':26}" + "".join(f"{shorten(layer, 8):>9}" for layer in layers))
        for name in CONDITIONS:
            lines.append(f"{NAMES.get(name, name):26}" + "".join(f"{cells[layer][name]:>9}" for layer in layers))
    lines += [f"{p['name']:26}{100 * p['accuracy']:.0f}±{100 * p['error']:.0f} ({p['source']})" for p in PUBLISHED]
    return lines


def _test_lines(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines about the paired tests of the last target, which is all layers if there are several."""
    lines = [f"paired t-tests by map, p after Holm ({differences[-1]['layer']}):"] if differences else []
    for row in differences:
        if row["layer"] == differences[-1]["layer"]:
            names = " − ".join(NAMES.get(row[end], row[end]) for end in ("first", "second"))
            p = f"= {row['p_holm']:.2g}" if row["p_holm"] >= 0.001 else "< 0.001"
            lines.append(f"  {names}: {100 * row['difference']:+.1f} ± {100 * row['se']:.1f}, p {p}")
    return lines


@styled()
def draw_forced_choice(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the accuracy of each condition by layer with standard errors, together with chance and people's accuracy."""
    layers = [name for name in dict.fromkeys(row["layer"] for row in table) if name != ALL]
    figure = new_figure(figsize=(9, 5))
    axis = figure.subplots()
    for number, name in enumerate(CONDITIONS):
        rows = [row for row in table if row["condition"] == name and row["layer"] in layers]
        control = CONDITIONS[name][1]
        colour = PALETTE[list(CONDITIONS).index(name.removeprefix("other_"))]
        x = [k + (number - 2) * 0.05 for k in range(len(layers))]
        axis.errorbar(
            *(x, [100 * row["accuracy"] for row in rows], [100 * (row["se"] or 0) for row in rows]),
            color=colour,
            marker="o",
            ls=":" if control else "-",
            mfc=WHITE if control else colour,
            label=NAMES.get(name, name),
        )
    axis.axhline(50, color=INK, lw=0.8, ls="--")
    end = len(layers) - 0.4
    axis.text(end, 50, "chance", va="center")
    for row in PUBLISHED:
        axis.axhline(100 * row["accuracy"], color=SOFT, lw=0.8, ls="--")
        words = row["name"].replace(", ", ",\n")
        axis.text(end, 100 * row["accuracy"], words, va="center", color=SOFT, fontsize=8)
    counts = {row["layer"]: f"{row['maps']} maps\n{row['trials']} trials" for row in table}
    axis.set_xticks(range(len(layers)), [f"{layer}\n{counts[layer]}" for layer in layers])
    lowest = min([30, *(100 * (row["accuracy"] - (row["se"] or 0)) - 1 for row in table)])
    axis.set(xlim=(-0.5, len(layers) - 0.5), ylim=(lowest, 101), ylabel="right choices (%), ± standard error")
    axis.set_title(
        "Which of two images excites a map more? Another network chooses from the map's pictures\n"
        "(people: other images and another network, Borowski et al. 2021)"
    )
    figure.legend(loc="outside lower center", ncols=5)
    return figure


# ---- the quiz


def quiz_trials(shown: TrialPictures, count: int, key: int) -> list[dict[str, Any]]:
    """Return `count` trials of each condition for the page, with a different map for each while there are enough.

    Each trial has its layer, map, condition, the pictures that are shown, which query excites the map more (0: left,
    1: right), and the activations, left and right.
    """
    trials, quiz = shown.trials, []
    maps, pairs = trials.queries.shape[:2]
    wanted = [name for name in CONDITIONS for _ in range(count)]
    right = (random_bits(make_key(key, 4), torch.arange(len(wanted))) & 1).tolist()
    for number, (name, answer) in enumerate(zip(wanted, right, strict=True)):
        place, pair = number % maps, number // maps % pairs
        kinds, of_other = CONDITIONS[name]
        references = shown.references((place + 1) % maps if of_other else place)
        columns = math.ceil(math.sqrt(len(references["patches"])))
        queries, values = shown.queries(place)[pair], trials.values[place, pair]
        order = [answer, 1 - answer]  # the first query is the strong one
        quiz.append(
            {
                "layer": shown.layer,
                "map": int(trials.maps[place]),
                "condition": name,
                "references": [(kind, mosaic(_shrink(references[kind]), columns, gap=2)) for kind in kinds],
                "queries": list(_shrink(queries)[order].numpy()),
                "answer": answer,
                "values": [float(f"{v:.3g}") for v in values[order].tolist()],
            }
        )
    return quiz


def _shrink(pictures: Tensor) -> Tensor:
    """Return pictures, uint8 [n, s, s, 3], with sides of at most _QUIZ_SIDE."""
    return resize(pictures.permute(0, 3, 1, 2), min(pictures.shape[1], _QUIZ_SIDE)).permute(0, 2, 3, 1)
