"""job=schema: every YAML file is valid under its group's JSON schema, and mistakes are not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from zfnet.jobs.schema import group_schemas

FILES = sorted(ROOT.glob("conf/**/*.yaml")) + sorted(ROOT.glob("examples/extend/conf/**/*.yaml"))
FILES = [p for p in FILES if "hydra" not in p.parts and p.name != "local.yaml"]
_TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
SCHEMAS = group_schemas()


def group_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    below = parts[parts.index("conf") + 1 :]
    return below[0] if len(below) > 1 else "config"


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value is valid under a schema; only the keywords of these schemas are supported."""
    kind = schema.get("type")
    if kind == "boolean" and not isinstance(value, bool):
        return False
    if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool)):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "anyOf" in schema and not any(fits(value, part) for part in schema["anyOf"]):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above, below = schema.get("exclusiveMinimum", value - 1), schema.get("exclusiveMaximum", value + 1)
        return low <= value <= high and above < value < below
    if isinstance(value, list):
        many = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return many and all(fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        others = {True: {}, False: None}.get(others, others) if isinstance(others, bool) else others
        return all(key in value for key in schema.get("required", [])) and all(
            fits(item, known[key]) if key in known else others is not None and fits(item, others)
            for key, item in value.items()
        )
    return True


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_fits_the_schema_of_its_group(path: Path) -> None:
    assert fits(yaml.safe_load(path.read_text(encoding="utf-8")), SCHEMAS[group_of(path)])


@pytest.mark.parametrize(
    ("group", "content"),
    [
        ("trainer", "epochs: 0"),
        ("trainer", "epoch: 3"),
        ("trainer", "precision: fp16"),
        ("trainer", "deterministic: maybe"),
        ("model", "conv1: {channels: 4, kernel: 7}"),
        ("model", "dropout: 1.0"),
        ("data", "{name: folder, train_images: 5}"),
        ("data", "mean: [0.5, 0.5]"),
        ("augment", "flip: 2"),
        ("experiment", "trainer: {epochs: many}"),
        ("experiment", "optimiser: {lr: 0.1}"),
        ("config", "seed: -1"),
        ("job", "job: {name: occlusion, _target_: zfnet.analyses.occlusion.OcclusionJob, patches: 3}"),
        ("job", "job: {name: occlusion, _target_: zfnet.analyses.occlusion.OcclusionJob, count: 0}"),
        ("logger", "csv: zfnet.training.loggers.CSVLogger"),
    ],
)
def test_mistakes_do_not_fit(group: str, content: str) -> None:
    assert not fits(yaml.safe_load(content), SCHEMAS[group])


def test_values_of_other_keys_and_values_to_come_fit() -> None:
    for content in ("{epochs: '${seed}'}", "{epochs: '???'}", "{defaults: [auto, _self_], epochs: 3}"):
        assert fits(yaml.safe_load(content), SCHEMAS["trainer"]), content


def test_keys_are_described_by_the_comments_of_their_files() -> None:
    jobs = SCHEMAS["job"]["properties"]["job"]["anyOf"]
    (occlusion,) = [job["properties"] for job in jobs if {"fill", "patch", "layer"} <= job["properties"].keys()]
    assert occlusion["patch"]["description"] == "side of the square in input pixels; null: a fifth of the image"
    assert SCHEMAS["trainer"]["properties"]["accumulate"]["description"].startswith("split each batch")
    top = SCHEMAS["experiment"]["properties"]
    assert all(top[key]["description"] for key in ("seed", "run", "images", "imports"))


def test_schema_job_writes_a_file_for_each_group(run_py) -> None:
    answer = run_py("job=schema")
    assert answer.code == 0, answer.err
    groups = {p.name for p in (ROOT / "conf").iterdir() if p.is_dir()} - {"hydra"}
    written = {p.stem: json.loads(p.read_text()) for p in Path("schema").glob("*.json")}
    assert written == json.loads(json.dumps(SCHEMAS))
    assert written.keys() == groups | {"config"}


def test_schema_job_expands_the_home_folder_and_refuses_a_file(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_py("job=schema", "job.folder=~/schemas").code == 0
    assert (tmp_path / "schemas/optimizer.json").is_file()
    (tmp_path / "file").touch()
    assert "cannot be created" in run_py("job=schema", "job.folder=~/file").error
