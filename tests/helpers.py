"""What several tests share."""

from __future__ import annotations

from pathlib import Path

from zfnet.composing import compose as compose_words
from zfnet.config import Config, read_config
from zfnet.hydra_record import register_resolvers
from zfnet.jobs.train import train
from zfnet.run import RunDirectory

# The built-in images at a size that trains in a second or two.
TINY = (
    "experiment=quickstart",
    "trainer.epochs=2",
    "trainer.tensorboard=false",
    "data.train_images=200",
    "data.test_images=50",
    "data.batch_size=20",
)


def compose(*words: str) -> Config:
    """Return the config that these words on the command line would give."""
    register_resolvers()
    return read_config(compose_words(words))


def train_tiny(folder: Path, *words: str) -> RunDirectory:
    """Train the tiny run, with these overrides, in `folder`."""
    config, run = compose(*TINY, *words), RunDirectory(folder)
    run.claim(config)
    train(config, run)
    return run
