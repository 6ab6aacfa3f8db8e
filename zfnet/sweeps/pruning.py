"""A trial's side of pruning: after each epoch the study gets the result, and may end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

# in `hydra.job.env_set`: the number of the trial that a job belongs to
TRIAL = "ZFNET_TRIAL"


def trial_report() -> Callable[[float, int], bool] | None:
    """Return a function that reports (validation accuracy, epoch) to this job's trial and returns whether to prune.

    None unless the job is a trial of a search that prunes. A job learns this from Hydra's own config, so it may run in
    any process and on any machine.
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    number = hydra.job.env_set.get(TRIAL)
    if number is None:
        return None
    from zfnet.sweeps.optuna_search import SearchSettings, open_trial  # optuna is an extra

    settings: Any = OmegaConf.to_container(hydra.sweeper, resolve=True)
    search = SearchSettings.read(
        {k: v for k, v in settings.items() if k != "params" and not k.startswith("_")}
    )
    if not search.prunes:
        return None
    trial = open_trial(search, Path(str(hydra.sweep.dir)), int(number))

    def report(value: float, epoch: int) -> bool:
        trial.report(value, epoch)
        return trial.should_prune()

    return report
