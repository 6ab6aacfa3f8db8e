"""job=schema: write JSON schemas of the YAML files in conf/, from the classes that validate a config."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from zfnet.config.errors import UserError
from zfnet.config.instantiate import resolve
from zfnet.config.schema import DATA, AugmentConfig, Config, Job, ModelConfig, TrainerConfig
from zfnet.config.trust import CONF
from zfnet.runs.directory import write_atomically
from zfnet.runs.hydra_record import described_keys

_TARGET = {"_target_": {"type": "string", "description": "dotted name of a class"}}
_PART = {"type": "object", "properties": _TARGET}  # the class defines the other keys
_DEFAULTS = {"type": "array", "description": "Hydra's defaults list: the configs that this file extends"}
# a file can take a value from another key (`${…}`) or leave it to the user (`???`)
_INTERPOLATION = {"type": "string", "pattern": r"^(\$\{.*\}|\?\?\?)$"}
_GLOBAL = ("config", "experiment", "debug", "job")  # the files of these groups contain whole configs


@dataclass(kw_only=True)
class SchemaJob(Job):
    folder: str

    def main(self, config: Config, output: Path) -> None:
        """Write one file for each group."""
        folder = Path(os.path.expanduser(self.folder))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"job.folder={folder}: cannot be created ({error.strerror})") from error
        for group, schema in group_schemas().items():
            write_atomically(folder / f"{group}.json", json.dumps(schema, indent=1) + "\n")
        path = os.path.relpath(folder / "optimizer.json", CONF / "optimizer")
        print(f"written to {folder}; to use one, begin a file (such as one in conf/optimizer) with this line:")
        print(f"# yaml-language-server: $schema={path}")


def group_schemas() -> dict[str, dict[str, Any]]:
    """Return a JSON schema (2020-12) for each group of `conf/`, and `config` for config.yaml.

    No key is required, because a file can inherit keys from others.
    """
    parts = {
        "model": {"anyOf": [_class_schema(ModelConfig, "model"), {**_PART, "required": ["_target_"]}]},
        "data": {"anyOf": [_class_schema(cls, "data") for cls in dict.fromkeys(DATA.values())]},
        "augment": _class_schema(AugmentConfig, "augment"),
        "trainer": _class_schema(TrainerConfig, "trainer"),
        **dict.fromkeys(("loss", "optimizer", "scheduler"), _PART),
        **{group: {"type": "object", "additionalProperties": _PART} for group in ("logger", "callbacks")},
    }
    top = _class_schema(Config, "config")["properties"]
    whole = {
        "type": "object",
        "properties": {
            **{key: top[key] for key in ("seed", "run", "images", "runs", "source", "imports")},
            **parts,
            "job": {"anyOf": list(_jobs())},
            "hydra": {"type": "object"},
            "defaults": _DEFAULTS,
        },
        "additionalProperties": False,
    }
    schemas = {**{group: _with_defaults(part) for group, part in parts.items()}, **dict.fromkeys(_GLOBAL, whole)}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {group: {**head, "title": f"conf/{group}", **schema} for group, schema in schemas.items()}


def _jobs() -> Iterable[dict[str, Any]]:
    """Yield the schema of the settings of each job, which `_target_` distinguishes."""
    for path in sorted((CONF / "job").glob("*.yaml")):
        target = yaml.safe_load(path.read_text(encoding="utf-8"))["job"]["_target_"]
        schema = _class_schema(resolve("job", target, Job), f"job/{path.stem}")
        schema["properties"] |= {"name": {"const": path.stem}, "_target_": {"const": target}}
        yield schema
    own = {"_target_": {"type": "string", "pattern": r"^(?!zfnet\.)"}}
    yield {"type": "object", "properties": own, "required": ["_target_"], "description": "a job of your own"}


def _class_schema(cls: Any, group: str) -> dict[str, Any]:
    """Return the schema of a class without `$ref`s; the comments in `conf/<group>` describe its keys."""
    plain = TypeAdapter(cls).json_schema()
    schema: dict[str, Any] = _relaxed(plain, plain.get("$defs", {}))["anyOf"][0]  # the class itself, not `${…}`
    place = CONF / group
    for path in sorted(place.rglob("*.yaml")) if place.is_dir() else [place.with_suffix(".yaml")]:
        for key, _, _, comment in described_keys(path.read_text(encoding="utf-8")) if path.is_file() else ():
            if comment and key in schema["properties"]:
                schema["properties"][key].setdefault("description", comment)
    return schema


def _relaxed(node: Any, parts: dict[str, Any]) -> Any:
    """Return a schema with `$ref`s resolved and no required keys, in which any value can be `${…}` or `???`."""
    if isinstance(node, list):
        return [_relaxed(item, parts) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _relaxed(parts[node["$ref"].rpartition("/")[2]], parts)
    left_out = ("required", "default", "title", "$defs", "discriminator")
    made = {
        key: {k: _relaxed(v, parts) for k, v in value.items()} if key == "properties" else _relaxed(value, parts)
        for key, value in node.items()
        if key not in left_out
    }
    if node.get("type") in ("integer", "number", "boolean", "object", "array") or "enum" in node or "const" in node:
        return {"anyOf": [made, _INTERPOLATION]}
    return made


def _with_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a group's file, which can also contain Hydra's defaults list."""
    if "anyOf" in schema:
        return {"anyOf": [_with_defaults(part) for part in schema["anyOf"]]}
    return {**schema, "properties": {**schema.get("properties", {}), "defaults": _DEFAULTS}}
