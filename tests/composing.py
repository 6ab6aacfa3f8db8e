"""A cache of Hydra's compositions, and faster copies of configs and YAML files, which save most of the tests' time.

Each process composes the project's files with the same chosen groups only once. The overrides of keys, the `hydra`
fields that Hydra sets at run time and this package's checks are applied every time. Compositions that read a folder
outside the project are not cached. `ZFNET_COMPOSE_ANEW=1 python -m pytest` runs the tests without the cache.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import DefaultsList
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf, omegaconf

from zfnet.config.trust import CONF, _is_own

OWN = (CONF, CONF.parent / "examples/extend/conf")

_create = config_loader_impl.create_defaults_list
_compose_defaults = ConfigLoaderImpl._compose_config_from_defaults_list
_parse = OverridesParser.parse_rule
_load = OmegaConf.load
_load_stored = ConfigStore.load
_interpolation_map = defaults_list._create_interpolation_map
_deepcopy = DictConfig.__deepcopy__
_get_dumper = omegaconf.get_omega_conf_dumper
_SafeDumper = yaml.SafeDumper

_is_group: dict[Any, bool] = {}
_defaults: dict[Any, DefaultsList] = {}
_configs: dict[Any, bytes] = {}
_words: dict[Any, Any] = {}
_loaded: dict[str, bytes] = {}


def cache_compositions(patch: Any) -> None:
    """Cache Hydra's compositions until `patch`, a pytest.MonkeyPatch, is undone."""
    if os.environ.get("ZFNET_COMPOSE_ANEW") == "1":
        return
    patch.setattr(config_loader_impl, "create_defaults_list", _cached_defaults_list)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _cached_config)
    patch.setattr(OverridesParser, "parse_rule", _cached_parse)
    patch.setattr(OmegaConf, "load", _cached_load)
    patch.setattr(ConfigStore, "load", _load_stored_fast)
    patch.setattr(ConfigResult, "__deepcopy__", lambda result, _: _copied(result), raising=False)
    patch.setattr(defaults_list, "_create_interpolation_map", _interpolation_map_if_needed)
    # each composition deep-copies the store to protect it, which is unnecessary because `ConfigStore.load` copies too
    patch.setattr(ConfigStore, "__deepcopy__", lambda store, _: store, raising=False)
    patch.setattr(DictConfig, "__deepcopy__", _deepcopy_fast)
    patch.setattr(omegaconf, "get_omega_conf_dumper", lambda: _Dumper)
    patch.setattr(yaml, "SafeDumper", getattr(yaml, "CSafeDumper", _SafeDumper))


def restore_hydra(patch: Any) -> None:
    """Restore Hydra's own functions until `patch` is undone."""
    patch.setattr(config_loader_impl, "create_defaults_list", _create)
    patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _compose_defaults)
    patch.setattr(OverridesParser, "parse_rule", _parse)
    patch.setattr(OmegaConf, "load", _load)
    patch.setattr(ConfigStore, "load", _load_stored)
    patch.delattr(ConfigResult, "__deepcopy__", raising=False)
    patch.setattr(defaults_list, "_create_interpolation_map", _interpolation_map)
    patch.delattr(ConfigStore, "__deepcopy__", raising=False)
    patch.setattr(DictConfig, "__deepcopy__", _deepcopy)
    patch.setattr(omegaconf, "get_omega_conf_dumper", _get_dumper)
    patch.setattr(yaml, "SafeDumper", _SafeDumper)


def _cache_key(repo: Any) -> Any:
    """Return a key for all that a composition reads: Hydra's store, and the sources with each file's time and size.

    Return None if a source is outside this project.
    """
    state: list[Any] = sorted(_stored(ConfigStore.instance().repo))
    for source in repo.get_sources():
        is_file = source.scheme() == "file"
        if Path(source.path).resolve() not in OWN if is_file else not _is_own(source.scheme(), source.path):
            return None
        state.append((source.scheme(), source.provider, source.path))
        for folder, _, names in os.walk(source.path) if is_file else ():
            for name in names:
                file = os.stat(f"{folder}/{name}")
                state.append((folder, name, file.st_mtime_ns, file.st_size))
    return tuple(state)


def _stored(entries: dict[str, Any], group: str = "") -> Iterator[tuple[str, int]]:
    """Yield the name of each config in Hydra's store, with the id of its node, which distinguishes replaced configs."""
    for name, entry in entries.items():
        if isinstance(entry, dict):
            yield from _stored(entry, f"{group}/{name}")
        else:
            yield f"{group}/{name}", id(entry.node)


def _cached_defaults_list(
    repo: Any, config_name: str | None, overrides_list: Sequence[Override], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    """Replace Hydra's `create_defaults_list`: cache the defaults of the chosen groups, add the overrides of keys."""
    rest: dict[str, Any] = {"config_name": config_name, "prepend_hydra": prepend_hydra, "skip_missing": skip_missing}
    state = _cache_key(repo)
    if state is None:
        return _create(repo=repo, overrides_list=list(overrides_list), **rest)
    groups: list[Override] = []
    keys: list[Override] = []
    for override in overrides_list:
        if override.is_sweep_override():  # Hydra skips them too
            continue
        name = (state, override.key_or_group)
        if name not in _is_group:
            _is_group[name] = repo.group_exists(override.key_or_group)
        (groups if _is_group[name] and not isinstance(override.value(), dict) else keys).append(override)
    key = (state, tuple(override.input_line for override in groups), *rest.values())
    if key not in _defaults:  # errors are not cached
        _defaults[key] = _create(repo=repo, overrides_list=groups, **rest)
    known = _defaults[key]
    return DefaultsList(
        defaults=known.defaults, defaults_tree=known.defaults_tree, config_overrides=keys, overrides=known.overrides
    )


def _cached_config(self: ConfigLoaderImpl, defaults: Sequence[Any], repo: Any) -> DictConfig:
    """Replace `_compose_config_from_defaults_list`: cache the config of these defaults, without overrides of keys."""
    state = _cache_key(repo)
    if state is None:
        return _compose_defaults(self, defaults=list(defaults), repo=repo)
    key = (state, *map(dataclasses.astuple, defaults))
    if key not in _configs:
        config = _compose_defaults(self, defaults=list(defaults), repo=repo)
        OmegaConf.clear_cache(config)  # it contains the time, which would name the next run's directory
        _configs[key] = pickle.dumps(config)
    return pickle.loads(_configs[key])


def _cached_parse(self: OverridesParser, text: str, rule_name: str) -> Any:
    """Replace `OverridesParser.parse_rule`, because each command parses a word up to four times."""
    if (text, rule_name) not in _words:
        _words[text, rule_name] = _parse(self, text, rule_name)
    return copy.deepcopy(_words[text, rule_name])


def _cached_load(file: Any) -> Any:
    """Replace `OmegaConf.load`, because each composition reads conf/config.yaml again."""
    if not hasattr(file, "read"):
        return _load(file)
    text = file.read()
    if text not in _loaded:
        file.seek(0)  # load from the file rather than the text, so that errors name the file
        _loaded[text] = pickle.dumps(_load(file))
    return pickle.loads(_loaded[text])


def _copied(thing: Any) -> Any:
    """Return a deep copy in a fraction of copy.deepcopy's time."""
    return pickle.loads(pickle.dumps(thing))


def _load_stored_fast(self: ConfigStore, config_path: str) -> ConfigNode:
    """Replace `ConfigStore.load`, whose deepcopy is slow."""
    found = self._load(config_path)
    return dataclasses.replace(found, node=_copied(found.node))


def _interpolation_map_if_needed(overrides: Any, defaults: Sequence[Any], self_added: bool) -> DictConfig | None:
    """Replace Hydra's `_create_interpolation_map`, because only defaults that contain `${…}` use the map."""
    return _interpolation_map(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None


def _deepcopy_fast(self: DictConfig, _: Any) -> DictConfig:
    """Replace `DictConfig.__deepcopy__`, which is slow: Hydra copies the whole config four times for each job."""
    parent = self.__dict__["_parent"]
    self.__dict__["_parent"] = None  # the copy keeps the parent, and does not copy it
    try:
        copied = _copied(self)
    finally:
        self.__dict__["_parent"] = parent
    copied.__dict__["_parent"] = parent
    return copied


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """OmegaConf's YAML dumper with libyaml, which is faster and writes the same text, except that it escapes emoji."""


_Dumper.add_representer(str, _get_dumper().str_representer)
