"""Checks of a recipe that need PyTorch: made before any data is read."""

from __future__ import annotations

from zfnet.config import Config
from zfnet.construct import check_construction
from zfnet.training.schedule import EXTRA, check_interval


def check_recipe(config: Config) -> None:
    """Build optimizer and schedule on a dummy; raise UserError where a name or a value is not acceptable."""
    check_interval(config.scheduler, config.trainer.epochs)
    check_construction(config.optimizer, config.scheduler, EXTRA)
