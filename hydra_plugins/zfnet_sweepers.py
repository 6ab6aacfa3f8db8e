"""The sweepers `grid` and `optuna` (conf/hydra/sweeper). Hydra finds sweepers in this package, and only here.

Hydra imports this file at every start, so it imports nothing heavy itself.
"""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override


class _Sweeper(BasicSweeper):
    """What both share: overrides from the command line and from `params`, and jobs that may fail."""

    def _overrides(self, arguments: list[str]) -> list[Override]:
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        typed: list[Override] = parser.parse_overrides(arguments)
        keys = {override.get_key_element() for override in typed}
        listed: list[Override] = parser.parse_overrides(self._parse_config())
        merged = [o for o in listed if o.get_key_element() not in keys] + typed  # what was typed wins
        self._name_by_swept_keys(merged)
        return merged

    def _name_by_swept_keys(self, overrides: list[Override]) -> None:
        """Leave what all jobs share out of their directories' names."""
        assert self.config is not None
        swept = {o.key_or_group for o in overrides if o.is_sweep_override()}
        if swept:
            shared = [o.key_or_group for o in overrides if o.key_or_group not in swept]
            excluded = self.config.hydra.job.config.override_dirname.exclude_keys
            names = ",".join(f"'{key}'" for key in dict.fromkeys([*excluded, *shared]))
            self.config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{names}]"
            )

    def _jobs(self) -> Any:
        from zfnet.sweeps.launching import Jobs

        assert self.hydra_context is not None
        assert self.launcher is not None
        assert self.config is not None
        return Jobs(self.hydra_context, self.launcher, self.config)


class GridSweeper(_Sweeper):
    """Every combination of the values given."""

    def sweep(self, arguments: list[str]) -> None:
        jobs, first = self._jobs(), 0
        batches = self.split_arguments(self._overrides(arguments), self.max_batch_size)
        for batch in batches:
            jobs.launch(batch, first)
            first += len(batch)
        jobs.finish()


class OptunaSweeper(_Sweeper):
    """Optuna's choice of values, trial by trial."""

    def __init__(self, params: dict[str, str] | None = None, **settings: Any) -> None:
        super().__init__(max_batch_size=None, params=params)
        self.settings = settings

    def sweep(self, arguments: list[str]) -> None:
        from zfnet.sweeps.search import run_search
        from zfnet.sweeps.study import SearchSettings

        jobs, overrides = self._jobs(), self._overrides(arguments)
        run_search(SearchSettings(**self.settings), overrides, jobs)
        jobs.finish()
