"""The atlas: all feature maps of a network in one static page, with the images that excite each of them.

`atlas/index.html` contains every number and opens without a server or an internet connection. Pictures are separate
files next to it and load when the page shows them:

    sheets/<layer>_<kind>.webp    a thumbnail of every map of a layer: the first view
    maps/<layer>/<number>.webp    one map's projections (upper row) and patches (lower row)
    images/<number>.webp          an image, as the network sees it, in stored pixels
    atlas.json                    every number on the page

`write_single` puts everything into one file instead. `write_photographs` writes a page of your own photographs. Its
tiles link to the maps in the atlas: `index.html#conv5/12`.
"""

import base64
import csv
import hashlib
import html
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError
from zfnet.config.reading import read_bytes
from zfnet.config.schema import DataConfig
from zfnet.data import ImageSet
from zfnet.explain.crops import frame_size, view_maps
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import MapResponses
from zfnet.explain.receptive_field import receptive_boxes, receptive_field
from zfnet.explain.top_activations import LayerRecord, TopActivations
from zfnet.plots.pictures import GREY, mosaic
from zfnet.runs.directory import OUTPUTS, RunDirectory, write_atomically
from zfnet.runs.tables import to_rows

_PAGE = Path(__file__).parent / "atlas_page"
# the link to the quiz in the atlas page: hidden until the quiz is written, then visible
_QUIZ_LINK = (b'<a id="quiz" href="quiz.html" hidden>', b'<a id="quiz" href="quiz.html">')
KINDS = ("projections", "patches")
_MAPS_AT_ONCE = 32  # in one projection
_THUMBNAIL, _CELL = 96, 32  # sides in pixels; a thumbnail has 3×3 cells
_LISTED_CLASSES = 5  # for each map
Score = tuple[float, float | None, int]  # mean over a map's units, standard error (None for one unit), number of units
_LARGEST_LOSSLESS_SIDE = 32  # frames of at most this side (px) are too small for lossy compression


@dataclass(frozen=True)
class Verdict:
    """The scores of single maps from a run of job=verdict.

    name: the run directory's name; split: the split of its images
    scores: (layer, map) → measure → score, for the pictures by one method
    """

    name: str
    split: str
    scores: Mapping[tuple[str, int], Mapping[str, Score]]


@dataclass(frozen=True)
class Atlas:
    """The contents of the page. `images` are all or some of the images in the split named `split`.

    numbers: int64 [N], the images' numbers in the split; None if `images` is the whole split
    """

    title: str
    split: str
    deconvnet: Deconvnet
    images: ImageSet
    data: DataConfig
    search: TopActivations
    weights: str = ""  # hash of the weights
    responses: Mapping[str, MapResponses] = field(default_factory=dict)
    ablated: int = 0  # number of images over which the responses' effects are averaged
    nearest: Mapping[str, Any] = field(default_factory=dict)  # see `nearest_maps`
    other: Mapping[str, Any] | None = None  # the other network's name and, if it has one, its atlas
    verdict: Verdict | None = None
    numbers: Tensor | None = None

    def in_split(self, places: Tensor) -> list[int]:
        """Return the numbers that the images at these places have in the split."""
        return list((places if self.numbers is None else self.numbers[places]).tolist())


def write_atlas(atlas: Atlas, folder: Path, after_file: Callable[[], None] = lambda: None) -> Path:
    """Write the atlas and return the path of its page. Existing pictures are kept, so that a stopped job can resume.

    after_file: called after each group of files; can raise an exception to stop
    """
    layers = list(atlas.search.layers)
    for layer in layers:
        _write_maps(atlas, folder / "maps" / layer, layer, after_file)
    for layer in tqdm(layers, "thumbnails", unit="layer", disable=None, leave=False):
        for kind in KINDS:
            path = folder / "sheets" / f"{layer}_{kind}.webp"
            if not path.exists():
                _save(path, _thumbnail_sheet(atlas, folder / "maps" / layer, layer, kind), lossless=False)
            after_file()
    _write_images(atlas, folder / "images", after_file)
    metadata = _page_data(atlas)
    write_atomically(folder / "atlas.json", json.dumps(metadata, separators=(",", ":")))
    _write_page(folder / "index.html", "page", atlas.title, metadata)
    return folder / "index.html"


def _write_page(path: Path, name: str, title: str, metadata: Any) -> None:
    """Write the page from the template `name` and its script."""
    page = (_PAGE / f"{name}.html").read_text(encoding="utf-8")
    for mark, text in (
        ("title", html.escape(title)),
        ("style", (_PAGE / "page.css").read_text(encoding="utf-8")),
        ("script", (_PAGE / f"{name}.js").read_text(encoding="utf-8")),
        # inserted last, so that no text in the data is replaced as a placeholder
        ("metadata", json.dumps(metadata, separators=(",", ":")).replace("<", "\\u003c")),
    ):
        page = page.replace(f"<!-- {mark} -->", text)
    write_atomically(path, page)


@dataclass(frozen=True)
class Strongest:
    """A layer's strongest maps in one image, strongest first: their numbers, activations and pictures.

    projections, patches: uint8 [maps, s, s, 3]
    """

    maps: list[int]
    values: list[float]
    projections: Tensor
    patches: Tensor


@dataclass(frozen=True)
class Photograph:
    """An image: pixels uint8 [S, S, 3] as the network sees them, predictions (class, probability), maps by layer."""

    name: str
    pixels: Tensor
    predictions: Sequence[tuple[str, float]]
    layers: dict[str, Strongest]


def write_photographs(path: Path, photographs: Sequence[Photograph], title: str, link: str | None) -> None:
    """Write a self-contained page of photographs. Its tiles link to the atlas at `link`, unless that is None."""
    parts = [f"<header><h1>Strongest maps · {html.escape(title)}</h1></header>"]
    for photograph in photographs:
        classes = "".join(f"<li>{html.escape(c)} {p:.1%}</li>" for c, p in photograph.predictions)
        parts.append(
            f'<section class="photograph"><h2>{html.escape(photograph.name)}</h2><div class="row">'
            f"{_image_html(photograph.pixels, 224)}<ol>{classes}</ol></div>"
        )
        for layer, row in photograph.layers.items():
            tiles = []
            for number, value, *views in zip(row.maps, row.values, row.projections, row.patches, strict=True):
                label = f"{html.escape(layer)} · {number}"
                there = "" if link is None else f' href="{html.escape(link)}#{html.escape(layer)}/{number}"'
                pictures = "".join(_image_html(view, 96) for view in views)
                tiles.append(f"<a{there}>{pictures}<small>{label} · {value:.3g}</small></a>")
            shown = "".join(tiles) or "no map is active"
            parts.append(f'<h3>{html.escape(layer)}</h3><div class="row">{shown}</div>')
        parts.append("</section>")
    style = (_PAGE / "page.css").read_text(encoding="utf-8")
    write_atomically(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Strongest maps</title><style>{style}</style></head><body>{''.join(parts)}</body></html>\n",
    )


def _image_html(pixels: Tensor, side: int) -> str:
    """Return an HTML image, `side` px wide, of pixels, uint8 [h, w, 3]."""
    kind = ' class="pixels"' if len(pixels) < side // 2 else ""
    return f'<img{kind} width="{side}" height="{side}" alt="" src="{_data_url(pixels.numpy())}">'


def _data_url(pixels: np.ndarray) -> str:
    """Return a data: URL that contains the image of pixels, uint8 [h, w, 3]."""
    text = base64.b64encode(_encode_webp(pixels, lossless=len(pixels) <= _LARGEST_LOSSLESS_SIDE)).decode()
    return f"data:image/webp;base64,{text}"


def write_quiz(
    folder: Path, trials: Sequence[Mapping[str, Any]], about: Mapping[str, Any], atlas: Path | None = None
) -> Path:
    """Write quiz.html, a page with the trials and their pictures for people to answer; return its path.

    folder: where to write the page if `atlas` is None; otherwise it goes next to the atlas, and each links to the other
    trials: see `quiz_trials` of job=forced_choice, in the order in which the page asks them
    about: text on the page about the trials
    atlas: path of the network's atlas page
    """
    asked = [
        {**trial, "references": [[kind, _data_url(p)] for kind, p in trial["references"]]}
        | {"queries": [_data_url(p) for p in trial["queries"]]}
        for trial in trials
    ]
    number = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]  # the browser stores answers under this key
    name = None if atlas is None else atlas.name
    path = (folder if atlas is None else atlas.parent) / "quiz.html"
    _write_page(path, "quiz", str(about["title"]), {"id": number, **about, "atlas": name, "trials": asked})
    if atlas is not None:
        write_atomically(atlas, atlas.read_bytes().replace(*_QUIZ_LINK, 1))
    return path


def write_single(folder: Path) -> Path:
    """Put an atlas into one file next to its folder, remove the folder and return the file's path.

    Each picture becomes a block of text that the browser reads on demand. Only thumbnails precede the page's script.
    """
    page = (folder / "index.html").read_text(encoding="utf-8")
    blocks: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(folder.rglob("*.webp")):
        name = path.relative_to(folder).as_posix()
        text = base64.b64encode(path.read_bytes()).decode()
        block = f'<script type="text/plain" id="{html.escape(name)}">{text}</script>\n'
        blocks[name.startswith("sheets/")].append(block)
    before, _, rest = page.rpartition("<script>")
    single = folder.with_suffix(".html")
    script, _, end = rest.partition("</script>\n")
    write_atomically(single, "".join((before, *blocks[True], "<script>", script, "</script>\n", *blocks[False], end)))
    shutil.move(folder / "atlas.json", single.with_suffix(".json"))
    shutil.rmtree(folder)
    return single


def find_atlas(weights: str, folder: str | None = None) -> Path | None:
    """Return the page of the atlas of these weights in `folder` or, if that is None, the newest in outputs/ (or None).

    Raises UserError if `folder` contains no atlas of these weights.
    """
    for path, _ in _records(("atlas/atlas.json", "atlas.json"), weights, folder):
        for page in (path.with_name("index.html"), path.with_suffix(".html")):
            if page.is_file():
                return page
    if folder is not None:
        raise UserError(f"job.pages={folder}: contains no atlas of this network")
    return None


def link_to(page: Path, folder: Path) -> str:
    """Return the URL of `page` relative to `folder`, quoted because a folder's name can contain #, ? or %."""
    return quote(os.fsencode(os.path.relpath(page, folder)))


def find_verdict(weights: str, method: str, folder: str | None = None) -> Verdict | None:
    """Return the scores of `method` for these weights from the newest job=verdict in outputs/, or from `folder`.

    Returns None if outputs/ has none. Raises UserError if `folder` contains none for these weights or is damaged.
    """
    for record, content in _records(("verdict.json",), weights, folder):
        path = record.with_name("maps.csv")  # earlier versions did not write this file
        if path.is_file():
            try:
                return Verdict(path.parent.name, str(content.get("split")), _read_scores(path, method))
            except UserError:
                if folder is not None:
                    raise
    if folder is not None:
        raise UserError(f"job.verdict={folder}: contains no verdict of this network with maps.csv")
    return None


def _read_scores(path: Path, method: str) -> dict[tuple[str, int], dict[str, Score]]:
    scores: dict[tuple[str, int], dict[str, Score]] = {}
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(path).decode(), newline="")))
        if not rows:
            raise ValueError("it has no rows")
        for row in rows:
            mean, error = (float(row[key]) if row[key] else None for key in ("mean", "se"))
            if mean is None or not math.isfinite(mean) or not math.isfinite(error or 0):
                raise ValueError(f"mean={mean}, se={error}")
            if row["method"] == method:
                of_map = scores.setdefault((row["layer"], int(row["map"])), {})
                of_map[row["measure"]] = mean, error, int(row["n"])
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as the scores of maps ({type(error).__name__}: {error})") from error
    return scores


def _records(names: Sequence[str], weights: str, folder: str | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the JSON files with these names in outputs/ that belong to these weights, newest first.

    folder: search only this folder, and raise UserError for a damaged file; damaged files in outputs/ are skipped
    """
    if folder is None:
        found = [path for name in names for depth in ("*", "*/*") for path in OUTPUTS.glob(f"{depth}/{name}")]
        paths = sorted(found, key=lambda path: (path.stat().st_mtime_ns, path), reverse=True)
    else:
        paths = [Path(folder) / name for name in names]
    for path in paths:
        if path.is_file():
            try:
                record = RunDirectory(path.parent).read_json(path.name)
            except UserError:
                if folder is not None:
                    raise
                continue
            if isinstance(record, dict) and record.get("weights") == weights:
                yield path, record


def _write_maps(atlas: Atlas, folder: Path, layer: str, after_file: Callable[[], None]) -> None:
    """Write each map's picture: row 0 projections, row 1 patches, one column for each of the `top` images."""
    record = atlas.search.layers[layer]
    active = record.filled[:, 0].cpu()
    small = frame_size(atlas.deconvnet.chain, layer) <= _LARGEST_LOSSLESS_SIDE
    with tqdm(total=len(active), desc=f"atlas: {layer}", unit="map", disable=None, leave=False) as bar:
        for numbers in torch.arange(len(active)).split(_MAPS_AT_ONCE):
            wanted = [n for n in numbers.tolist() if active[n] and not (folder / f"{n}.webp").exists()]
            if wanted:
                maps = torch.tensor(wanted)
                views = view_maps(atlas.deconvnet, atlas.images, atlas.data, layer, record, maps)
                for n, tiles in zip(wanted, views.tiles, strict=True):
                    _save(folder / f"{n}.webp", mosaic(tiles.flatten(0, 1), tiles.shape[1]), lossless=small)
            bar.update(len(numbers))
            after_file()


def _thumbnail_sheet(atlas: Atlas, folder: Path, layer: str, kind: str) -> np.ndarray:
    """Return a mosaic of thumbnails, `_columns` per row, one for each map of a layer with its first nine pictures."""
    record = atlas.search.layers[layer]
    side, count = frame_size(atlas.deconvnet.chain, layer), len(record.values)
    top = min(9, record.values.shape[1])
    how = Image.Resampling.NEAREST if side < _CELL else Image.Resampling.BOX
    thumbnails = np.full((count, _THUMBNAIL, _THUMBNAIL, 3), GREY, np.uint8)
    for n in record.filled[:, 0].nonzero().flatten().tolist():
        with Image.open(folder / f"{n}.webp") as picture:
            upper = KINDS.index(kind) * side
            row = np.array(picture.convert("RGB"))[upper : upper + side]
        for place in range(top):
            cell = Image.fromarray(row[:, place * side : (place + 1) * side]).resize((_CELL - 1,) * 2, how)
            y, x = divmod(place, 3)
            thumbnails[n, y * _CELL : (y + 1) * _CELL - 1, x * _CELL : (x + 1) * _CELL - 1] = np.asarray(cell)
    return mosaic(torch.from_numpy(thumbnails), _columns(count))


def _columns(count: int) -> int:
    return max(1, round(count**0.5))


def _write_images(atlas: Atlas, folder: Path, after_file: Callable[[], None]) -> None:
    """Write every image shown next to a map once: the part that the network sees, in stored pixels."""
    shown = torch.cat([r.index[r.filled].cpu() for r in atlas.search.layers.values()]).unique()
    for group in tqdm(shown.split(256), "atlas: images", unit="×256", disable=None, leave=False):
        pixels = atlas.images.pixels(group)
        size = atlas.data.crop_size or pixels.shape[1]
        top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
        for number, image in zip(atlas.in_split(group), pixels[:, top : top + size, left : left + size], strict=True):
            if not (path := folder / f"{number}.webp").exists():
                _save(path, image.numpy(), lossless=size <= _LARGEST_LOSSLESS_SIDE)
        after_file()


def _save(path: Path, pixels: np.ndarray, lossless: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _encode_webp(pixels, lossless))


def _encode_webp(pixels: np.ndarray, lossless: bool) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=lossless, quality=60 if lossless else 88, method=2)
    return buffer.getvalue()


def _page_data(atlas: Atlas) -> dict[str, Any]:
    """Return every number on the page."""
    return {
        "weights": atlas.weights,
        "title": atlas.title,
        "split": atlas.split,
        "images": atlas.search.images,
        "rule": atlas.deconvnet.rule,
        "top": atlas.search.top,
        "classes": list(atlas.images.classes),
        "imageSize": atlas.data.image_size,
        "sample": len(next(iter(atlas.responses.values())).strongest) if atlas.responses else 0,
        "ablated": atlas.ablated,
        "other": atlas.other,
        "verdict": None if atlas.verdict is None else {"name": atlas.verdict.name, "split": atlas.verdict.split},
        "layers": [_layer_data(atlas, layer, record) for layer, record in atlas.search.layers.items()],
    }


def _layer_data(atlas: Atlas, layer: str, record: LayerRecord) -> dict[str, Any]:
    chain, stats = atlas.deconvnet.chain, atlas.search.statistics(layer)
    filled, places, values = record.filled.cpu(), record.places().cpu(), record.values.cpu()
    row, rank = filled.nonzero().unbind(1)
    place = places[row, rank]
    boxes = receptive_boxes(chain, layer, place[:, 1:]) / atlas.data.image_size
    labels, numbers = atlas.images.labels[place[:, 0]], atlas.in_split(place[:, 0])
    tops: list[list[list[float]]] = [[] for _ in range(len(values))]
    shown = (numbers, labels.tolist(), place[:, 1:].tolist(), boxes.tolist())
    for n, value, number, label, where, box in zip(row.tolist(), values[row, rank].tolist(), *shown, strict=True):
        tops[n].append([_rounded(value), number, label, *where, *map(_rounded, box)])
    present = atlas.search.class_counts.nonzero().flatten()
    best = stats.class_means.cpu()[:, present].topk(min(_LISTED_CLASSES, len(present)))
    means = [[_rounded(value) for value in row] for row in best.values.tolist()]
    more: dict[str, Any] = {}
    if responses := atlas.responses.get(layer):
        counts, highest = responses.histogram()
        more |= {"histogram": counts.tolist(), "highest": map(_rounded, highest.tolist())}
        if responses.effect is not None:
            most = responses.effect.abs().topk(min(_LISTED_CLASSES, responses.effect.shape[1]), dim=1).indices
            changes = [[_rounded(v) for v in row] for row in responses.effect.gather(1, most).tolist()]
            more["effect"] = [list(zip(*row, strict=True)) for row in zip(most.tolist(), changes, strict=True)]
    if layer in atlas.nearest:
        more["nearest"] = [[(name, n, _rounded(r)) for name, n, r in row] for row in atlas.nearest[layer]]
    if atlas.verdict is not None:
        known = (atlas.verdict.scores.get((layer, n), {}) for n in range(len(values)))
        more["scores"] = [
            {k: (_rounded(mean), error and _rounded(error), n) for k, (mean, error, n) in row.items()} for row in known
        ]
    return {
        "name": layer,
        "frame": frame_size(chain, layer),
        "field": max(receptive_field(chain, layer).kernel),
        "columns": _columns(len(values)),
        "maps": to_rows(
            mean=map(_rounded, stats.mean.tolist()),
            images=map(_rounded, stats.image_share.tolist()),
            positions=map(_rounded, stats.position_share.tolist()),
            selectivity=map(_rounded, stats.selectivity.tolist()),
            chance=map(_rounded, stats.chance.nan_to_num().tolist()),
            classes=[list(zip(*row, strict=True)) for row in zip(present[best.indices].tolist(), means, strict=True)],
            top=tops,
            **more,
        ),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
