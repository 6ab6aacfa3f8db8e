"""A trial's side of pruning: after each epoch the study hears of it, and may end the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from zfnet.sweeps.study import SearchSettings, open_study

if TYPE_CHECKING:
    pass


def trial_report() -> Callable[[float, int], bool] | None:
    """Return a function that reports (validation accuracy, epoch) to this job's trial and returns whether to prune.

    None unless the job is a trial of a search that prunes.

    A job learns this from Hydra's own config, so it may run in any process and on any machine.
    """
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    sweeper = OmegaConf.to_container(hydra.sweeper, resolve=True)
    assert isinstance(sweeper, dict)
    if sweeper.get("trial") is None or sweeper.get("pruner") in (None, "none"):
        return None
    from optuna.trial import Trial

    given = {str(k): v for k, v in sweeper.items() if k not in ("_target_", "params")}
    study = open_study(SearchSettings(**given), Path(hydra.sweep.dir), create=False)
    ids = {t.number: t._trial_id for t in study.get_trials(deepcopy=False)}
    trial = Trial(study, ids[sweeper["trial"]])

    def report(value: float, epoch: int) -> bool:
        trial.report(value, epoch)
        return trial.should_prune()

    return report
