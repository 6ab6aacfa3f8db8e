"""Checks of a recipe that need PyTorch: made before any data is read."""

from __future__ import annotations

from zfnet.config.instantiate import check_construction
from zfnet.config.schema import Config
from zfnet.model.sizes import feature_sizes
from zfnet.training.schedule import EXTRA, check_interval


def check_recipe(config: Config) -> None:
    """Build optimizer and schedule on a dummy; raise UserError where a name or a value is not acceptable."""
    feature_sizes(config.model, config.data.image_size)
    check_interval(config.scheduler, config.trainer.epochs)
    check_construction(config.optimizer, config.scheduler, EXTRA)
