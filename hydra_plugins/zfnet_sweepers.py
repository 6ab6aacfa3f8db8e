"""The sweepers `grid` and `optuna` (conf/hydra/sweeper). Hydra finds sweepers in this package, and only here.

Hydra imports this file at every start, so it imports nothing heavy itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from zfnet.sweeps.launch import SweepJobs


class _Sweeper(Sweeper):
    """What both share: overrides from the command line and from `params`, and jobs that may fail."""

    jobs: SweepJobs

    def __init__(self, params: Mapping[str, str] | None = None) -> None:
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from zfnet.sweeps.launch import SweepJobs

        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.jobs = SweepJobs(hydra_context, launcher, config)

    def _overrides(self, arguments: list[str]) -> list[Override]:
        """Parse `params` and the command line, which wins; name the jobs' directories by the swept keys."""
        parser = OverridesParser.create(config_loader=self.jobs.context.config_loader)
        typed: list[Override] = parser.parse_overrides(arguments)
        keys = {override.get_key_element() for override in typed}
        params: list[Override] = parser.parse_overrides([f"{k}={v}" for k, v in self.params.items()])
        overrides = [o for o in params if o.get_key_element() not in keys] + typed
        swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
        if swept:  # what all jobs share is left out of their directories' names
            self.jobs.leave_out_of_names([o.key_or_group for o in overrides if o.key_or_group not in swept])
        return overrides


class GridSweeper(_Sweeper):
    """Every combination of the values given."""

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None) -> None:
        super().__init__(params)
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> None:
        from zfnet.config.errors import UserError

        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise UserError(
                f"hydra.sweeper.max_batch_size={self.max_batch_size}: must be at least 1, or null"
            )
        words: dict[str, list[str]] = {}
        for override in self._overrides(arguments):
            key = override.get_key_element()
            if not override.is_sweep_override():
                values = [override.get_value_element_as_str()]
            elif override.is_discrete_sweep():
                values = list(override.sweep_string_iterator())
            else:
                raise UserError(
                    f"{override.input_line}: a grid needs single values, as in {key}=1,2; "
                    "hydra/sweeper=optuna searches intervals"
                )
            words[key] = [f"{key}={value}" for value in values]
        grid = [list(combination) for combination in itertools.product(*words.values())]
        size = self.max_batch_size or len(grid)
        for first in range(0, len(grid), size):
            self.jobs.launch(grid[first : first + size], first)
        self.jobs.finish()


class OptunaSweeper(_Sweeper):
    """Optuna's choice of values, trial by trial."""

    def __init__(self, params: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> None:
        from zfnet.sweeps.optuna_search import SearchSettings, run_search

        run_search(SearchSettings.read(self.settings), self._overrides(arguments), self.jobs)
        self.jobs.finish()
