"""A trial's side of pruning: after each epoch the study hears of it, and may end the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from zfnet.runs.signals import Pruned
from zfnet.sweeps.study import SearchSettings, open_study

if TYPE_CHECKING:
    from optuna.trial import Trial


class TrialWatcher:
    """Reports validation accuracy to a trial, and raises Pruned where its study has no hope for it."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Report one row of the history."""
        value = row.get("validation_accuracy")
        if value is None:
            return
        self.trial.report(value, row["epoch"])
        if self.trial.should_prune():
            raise Pruned(f"validation accuracy {value:.2%} after epoch {row['epoch']}, behind other trials")


def trial_watcher() -> TrialWatcher | None:
    """Return the watcher of this job, if it is a trial of a search that prunes.

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
    return TrialWatcher(Trial(study, ids[sweeper["trial"]]))
