"""A study in its storage: opened by name, asked for trials by any number of processes, cleared of dead ones."""

from __future__ import annotations

import inspect
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.randomness import make_key

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

# names in configs and Optuna's classes; CmaEsSampler is missing because it unpickles what it finds in the storage
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler", "qmc": "QMCSampler"}
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "percentile": "PercentilePruner",
    "halving": "SuccessiveHalvingPruner",
    "hyperband": "HyperbandPruner",
}
_UNSIGNED = timedelta(
    minutes=1
)  # after this a trial that names no process was left by one that died in asking


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What conf/hydra/sweeper/optuna.yaml holds, checked."""

    n_trials: int
    direction: str
    study_name: str
    sampler: str
    pruner: str
    seed: int = 0
    n_jobs: int = 1
    storage: str | None = None
    sampler_settings: Mapping[str, Any] = field(default_factory=dict)
    pruner_settings: Mapping[str, Any] = field(default_factory=dict)
    trial: int | None = None

    def __post_init__(self) -> None:
        for key in ("n_trials", "n_jobs"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"hydra.sweeper.{key}={value}: must be a whole number, at least 1")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise UserError(f"hydra.sweeper.seed={self.seed}: must be a whole number, at least 0")
        for key, known in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(
                    f"hydra.sweeper.{key}={value}: no such {key}{did_you_mean(str(value), known)}"
                )
        if self.direction not in ("maximize", "minimize"):
            raise UserError(f"hydra.sweeper.direction={self.direction}: must be maximize or minimize")


def make_pruner(settings: SearchSettings) -> BasePruner:
    """Return the pruner that the settings name."""
    import optuna

    return _construct("pruner", getattr(optuna.pruners, PRUNERS[settings.pruner]), settings.pruner_settings)


def make_sampler(settings: SearchSettings, trial: int) -> BaseSampler:
    """Return the sampler for one trial. Its random numbers depend on the seed and the trial's number only.

    QMC's points make one sequence, so there the seed alone counts.
    """
    import optuna

    seed = settings.seed if settings.sampler == "qmc" else make_key(settings.seed, trial)
    given = {"seed": seed, **settings.sampler_settings}
    return _construct("sampler", getattr(optuna.samplers, SAMPLERS[settings.sampler]), given)


def _construct(slot: str, cls: type, settings: Mapping[str, Any]) -> Any:
    known = list(inspect.signature(cls).parameters)
    for key in settings:
        if key not in known:
            raise UserError(
                f"hydra.sweeper.{slot}_settings.{key}: {cls.__name__} has no such setting{did_you_mean(key, known)}"
            )
    try:
        return cls(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"hydra.sweeper.{slot} ({cls.__name__}): {str(error).splitlines()[0]}") from error


def open_study(settings: SearchSettings, sweep: Path, create: bool = True) -> Study:
    """Open the study that the settings name, or begin it. Raises UserError if the storage cannot be used."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise UserError(f"hydra/sweeper=optuna needs Optuna ({error}): pip install -e '.[sweep]'") from error

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    place = settings.storage or str(sweep / "study.journal")
    try:
        storage: Any
        if settings.storage is None:
            sweep.mkdir(parents=True, exist_ok=True)
            storage = optuna.storages.JournalStorage(JournalFileBackend(place))
        else:
            storage = optuna.storages.RDBStorage(settings.storage)
        if not create:
            return optuna.load_study(
                study_name=settings.study_name,
                storage=storage,
                sampler=optuna.samplers.RandomSampler(),  # a job asks for nothing
                pruner=make_pruner(settings),
            )
        study = optuna.create_study(
            study_name=settings.study_name,
            storage=storage,
            direction="maximize" if settings.direction == "maximize" else "minimize",
            pruner=make_pruner(settings),
            load_if_exists=True,
        )
    except UserError:
        raise
    except Exception as error:  # any of a database driver's, an address parser's, a file system's
        shown = place.partition("@")[2] or place  # without a password
        raise UserError(f"hydra.sweeper.storage={shown}: {str(error).strip().splitlines()[0]}") from error
    if study.direction.name.lower() != settings.direction:
        raise UserError(
            f"hydra.sweeper.direction={settings.direction}: the study {settings.study_name} says "
            f"{study.direction.name.lower()}; choose another hydra.sweeper.study_name"
        )
    return study


class Worker:
    """One process of a study, known to the others by a lock that it holds as long as it lives."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        folder = sweep / ".workers"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder.absolute() / f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
        self._lock = FileLock(self.path)

    def __enter__(self) -> Worker:
        self._lock.acquire(timeout=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self.path.unlink(missing_ok=True)

    @property
    def name(self) -> dict[str, str]:
        """What a trial records about the process that runs it."""
        return {"host": socket.gethostname(), "lock": str(self.path)}

    def one_at_a_time(self) -> FileLock:
        """Keep the other processes of this sweep directory from asking at the same moment."""
        return FileLock(self.sweep / ".workers" / "asking")

    def left_behind(self, trial: FrozenTrial) -> bool:
        """Whether a trial that counts as running has lost its process."""
        owner = trial.user_attrs.get("worker")
        if owner is None:
            started = trial.datetime_start
            return started is not None and datetime.now() - started > _UNSIGNED
        path = Path(owner["lock"])
        if path == self.path:
            return False
        if not path.exists():  # its process has ended; or it is on a machine whose disk this one does not see
            return bool(owner["host"] == socket.gethostname())
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False


def ask(
    study: Study, settings: SearchSettings, space: Mapping[str, BaseDistribution], worker: Worker
) -> Trial | None:
    """Return the next trial of the study; None when it has as many as it should.

    Trials that a dead process left running are asked for again first, with the same values. No values are run
    twice: where a trial with the same ones is finished, its outcome holds for this one; where another process is
    running it at this moment, other values are asked for.
    """
    from optuna.trial import TrialState

    while True:
        with worker.one_at_a_time():
            _ask_again_for_lost_trials(study, worker)
            trials = study.get_trials(deepcopy=False)
            if _count(trials) >= settings.n_trials and not _waiting(trials):
                return None
            study.sampler = make_sampler(settings, len(trials))
            try:
                trial = study.ask(dict(space))
            except ValueError as error:
                raise UserError(
                    f"the study {settings.study_name} has another search space ({str(error).splitlines()[0]}): "
                    "choose another hydra.sweep.dir or hydra.sweeper.study_name"
                ) from error
            trial.set_user_attr("worker", worker.name)
        trials = study.get_trials(deepcopy=False)
        before = [t for t in trials if t.number < trial.number]
        if _count(before) >= settings.n_trials:  # another process without our lock took the last one
            _void(study, trial)
            return None
        twins = {t.state.name: t for t in before if t.params == trial.params and not t.user_attrs.get("void")}
        if "COMPLETE" in twins:
            study.tell(trial, twins["COMPLETE"].value)
        elif "PRUNED" in twins:
            study.tell(trial, state=TrialState.PRUNED)
        elif "RUNNING" in twins:
            _void(study, trial)
            time.sleep(0.5)
        else:
            return trial


def _waiting(trials: list[FrozenTrial]) -> bool:
    return any(t.state.name == "WAITING" for t in trials)


def _count(trials: list[FrozenTrial]) -> int:
    """How many trials count towards n_trials: not those that were asked for again or given back."""
    again = {t.user_attrs.get("retry_of") for t in trials}
    return sum(t.number not in again and not t.user_attrs.get("void") for t in trials)


def _void(study: Study, trial: Trial) -> None:
    from optuna.trial import TrialState

    trial.set_user_attr("void", True)
    study.tell(trial, state=TrialState.FAIL)


def _ask_again_for_lost_trials(study: Study, worker: Worker) -> None:
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if worker.left_behind(trial):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
