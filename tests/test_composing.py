"""The cached compositions of tests/composing.py equal Hydra's."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig, OmegaConf

from tests import composing
from zfnet.config.trust import CONF

COMMANDS: tuple[list[str], ...] = (
    [],
    ["experiment=quickstart", "optimizer=sgd", "optimizer.lr=0.5", "seed=3"],
    ["experiment=quickstart", "optimizer=sgd", "~optimizer.nesterov", "+callbacks.own={_target_: a.B}", "seed=4"],
    ["job=evaluate", "run=x", "job.split=test", "data.mean=[0.5,0.4,0.3]", "augment=none"],
    ["~scheduler", "+optimizer@second=adamw", "optimizer.lr=0.1"],
    [f"hydra.searchpath=[file://{CONF.parent}/examples/extend/conf]", "model=tiny_resnet", "optimizer=sgd"],
    ["experiment=cifar10_fast", "model.conv3=null", "++model.unknown=1", "hydra/launcher=basic"],
)


def described(config: DictConfig) -> tuple[str, list[object]]:
    """Return a config's YAML, and OmegaConf's metadata of each of its mappings."""
    nodes: list[object] = []

    def visit(node: DictConfig, name: str) -> None:
        nodes.append((name, type(node), vars(node._metadata) | {"resolver_cache": None}))  # it contains the time
        for key in [] if node._is_none() or node._is_missing() else list(node):
            if isinstance(below := node._get_node(key), DictConfig):
                visit(below, f"{name}.{key}")

    visit(config, "")
    return OmegaConf.to_yaml(config), nodes


def compose_described(words: list[str]) -> tuple[str, list[object]]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return described(compose("config", words, return_hydra_config=True))


@pytest.mark.parametrize("words", COMMANDS, ids=range(len(COMMANDS)))
def test_remembered_compositions_are_hydras(words, monkeypatch):
    # an earlier test may have set the package's loader, which resolves directory names, and these contain the time
    monkeypatch.setattr("hydra._internal.hydra.ConfigLoaderImpl", ConfigLoaderImpl)
    with pytest.MonkeyPatch.context() as patch:
        composing.cache_compositions(patch)
        first, again = compose_described(words), compose_described(words)
    composing.restore_hydra(monkeypatch)
    assert first == again == compose_described(words)
