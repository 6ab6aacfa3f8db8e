"""The sweepers `grid` and `optuna` (conf/hydra/sweeper). Hydra finds sweepers in this package, and only here.

Hydra imports this file at every start, so it imports nothing heavy itself.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
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
    params: Mapping[str, str] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from zfnet.sweeps.launch import SweepJobs

        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.jobs = SweepJobs(hydra_context, launcher, config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the jobs of `params` and of the command line, which wins; the swept keys name their directories."""
        parser = OverridesParser.create(config_loader=self.jobs.context.config_loader)
        every = [*(f"{key}={value}" for key, value in (self.params or {}).items()), *arguments]
        overrides = {o.get_key_element(): o for o in parser.parse_overrides(every)}
        swept = {o.key_or_group for o in overrides.values() if o.is_sweep_override()}
        if swept:  # what all jobs share is left out of their directories' names
            keys = [o.key_or_group for o in overrides.values() if o.key_or_group not in swept]
            self.jobs.leave_out_of_names(keys)
        self.launch(list(overrides.values()))
        self.jobs.finish()

    @abstractmethod
    def launch(self, overrides: list[Override]) -> None: ...


class GridSweeper(_Sweeper):
    """Every combination of the values given."""

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, params

    def launch(self, overrides: list[Override]) -> None:
        from zfnet.config.errors import UserError

        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise UserError(f"hydra.sweeper.max_batch_size={self.max_batch_size}: must be at least 1, or null")
        choices: list[list[str]] = []
        for override in overrides:
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
            if not values:
                raise UserError(f"{override.input_line}: names no value")
            choices.append([f"{key}={value}" for value in values])
        grid = [list(combination) for combination in itertools.product(*choices)]
        self.jobs.check(grid)
        size = self.max_batch_size or len(grid)
        for first in range(0, len(grid), size):
            self.jobs.launch(grid[first : first + size], first)


class OptunaSweeper(_Sweeper):
    """Optuna's choice of values, trial by trial."""

    def __init__(self, params: Mapping[str, str] | None = None, **_: Any) -> None:
        self.params = params

    def launch(self, overrides: list[Override]) -> None:
        from zfnet.sweeps.optuna_search import run_search

        run_search(overrides, self.jobs)
