"""Optuna's search over a space of overrides: ask for a trial, launch it as a job, tell what it reached.

A study lives in its storage alone, so processes come and go: rerunning a search that was killed continues it,
and several processes may share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import Override

from zfnet.config.errors import UserError
from zfnet.sweeps.launching import Jobs, Outcome
from zfnet.sweeps.space import any_values, fixed_overrides, job_overrides, search_space, what_counts
from zfnet.sweeps.study import SearchSettings, Worker, ask, make_sampler, open_study

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial


def run_search(settings: SearchSettings, overrides: Sequence[Override], jobs: Jobs) -> None:
    """Launch trials until the study has `n_trials`; raise UserError if it cannot be opened or is another search."""
    space, fixed = search_space(overrides), fixed_overrides(overrides)
    # what cannot be composed or constructed is an error before there is a study
    jobs.compose([*fixed, *job_overrides(any_values(space))])
    make_sampler(settings, 0)
    study = open_study(settings, jobs.folder)
    _same_search(study, what_counts(fixed))
    with Worker(jobs.folder) as worker:
        while True:
            batch: list[Trial] = []
            while len(batch) < settings.n_jobs and (trial := ask(study, settings, space, worker)) is not None:
                batch.append(trial)
            if not batch:
                return
            words = [
                [*fixed, *job_overrides(trial.params), f"hydra.sweeper.trial={trial.number}"]
                for trial in batch
            ]
            outcomes = jobs.launch(words, first=batch[0].number)
            for trial, outcome in zip(batch, outcomes, strict=True):
                _tell(study, trial, outcome)


def _same_search(study: Study, fixed: list[str]) -> None:
    known = study.user_attrs.get("fixed")
    if known is None:
        study.set_user_attr("fixed", fixed)
    elif known != fixed:
        differing = sorted(set(known) ^ set(fixed))
        raise UserError(
            f"the study {study.study_name} was begun with other settings ({', '.join(differing)}): "
            "choose another hydra.sweep.dir or hydra.sweeper.study_name"
        )


def _tell(study: Study, trial: Trial, outcome: Outcome) -> None:
    from optuna.trial import TrialState

    if outcome.state == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif outcome.value is not None:
        study.tell(trial, outcome.value)
    else:
        if outcome.error is None:
            raise UserError(
                "hydra/sweeper=optuna searches by validation accuracy, and these runs have none: set data.validation"
            )
        trial.set_user_attr("error", str(outcome.error))
        study.tell(trial, state=TrialState.FAIL)
