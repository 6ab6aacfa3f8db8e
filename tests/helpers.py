"""What several tests share."""

from __future__ import annotations

from pathlib import Path

from zfnet.composing import compose as compose_words
from zfnet.composing import forgive, read_command
from zfnet.config import Config, read_config
from zfnet.hydra_record import register_resolvers
from zfnet.jobs.common import UsedRun
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


def used(run: RunDirectory, *words: str) -> UsedRun:
    """Return a run as the jobs that read one see it, with these overrides on the command line."""
    register_resolvers()
    command = ["job=evaluate", f"run={run.folder}", *words]
    return UsedRun(read_command(compose_words(forgive(command)), command), command)
