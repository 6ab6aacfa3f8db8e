"""Optuna's search over a space of overrides: ask for a trial, launch it as a job, tell what it reached.

A study lives in its storage alone, so processes come and go: a search that was killed continues when it is run
again, and several processes may share one study.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.randomness import make_key
from zfnet.config.schema import NOT_IDENTITY
from zfnet.sweeps.launch import Outcome, SweepJobs
from zfnet.sweeps.pruning import TRIAL

# -- settings, and what they construct

# what a config may name: Optuna's own classes, so nothing is looked up or imported by a name from a config
CLASSES = {
    slot: {
        f"{module.__name__}.{name}": cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, base) and not inspect.isabstract(cls)
    }
    for slot, module, base in (
        ("sampler", optuna.samplers, optuna.samplers.BaseSampler),
        ("pruner", optuna.pruners, optuna.pruners.BasePruner),
    )
}
_ENDS_STUDY = "runs every combination and needs Optuna's own loop: use hydra/sweeper=grid"
REFUSED = {
    "optuna.samplers.CmaEsSampler": "unpickles what it finds in the storage, which can run code",
    "optuna.samplers.BruteForceSampler": _ENDS_STUDY,
    "optuna.samplers.GridSampler": _ENDS_STUDY,
}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What conf/hydra/sweeper/optuna.yaml holds, checked."""

    n_trials: int
    n_jobs: int
    direction: str
    study_name: str
    storage: str | None
    seed: int
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any]

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> SearchSettings:
        """Return the checked settings; raise UserError naming the key that is wrong."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings:
            if key not in known:
                raise UserError(f"hydra.sweeper.{key}: no such key{did_you_mean(str(key), known)}")
        for key, least in (("n_trials", 1), ("n_jobs", 1), ("seed", 0)):
            value = settings[key]
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"hydra.sweeper.{key}={value}: must be a whole number, at least {least}")
        if settings["direction"] not in ("maximize", "minimize"):
            raise UserError(f"hydra.sweeper.direction={settings['direction']}: must be maximize or minimize")
        for slot in CLASSES:
            if not isinstance(settings[slot], Mapping):
                raise UserError(
                    f"hydra.sweeper.{slot}={settings[slot]}: choose one by hydra/sweeper/{slot}={settings[slot]}"
                )
        return cls(**settings)

    @property
    def prunes(self) -> bool:
        return self.pruner.get("_target_") != "optuna.pruners.NopPruner"

    def make_pruner(self) -> optuna.pruners.BasePruner:
        return construct("pruner", self.pruner)

    def make_sampler(self, trial: int) -> optuna.samplers.BaseSampler:
        """Return the sampler for one trial. Its random numbers depend on the seed and the trial's number only.

        QMC's points make one sequence, so there the seed alone counts.
        """
        one_sequence = self.sampler.get("_target_") == "optuna.samplers.QMCSampler"
        seed = self.seed if one_sequence else make_key(self.seed, trial)
        return construct("sampler", self.sampler, seed=seed)


def construct(slot: str, settings: Mapping[str, Any], **defaults: Any) -> Any:
    """Construct the sampler or pruner that `settings` names by `_target_`, and those in it.

    `defaults` are for the keys that the class has. Raises UserError for anything but Optuna's samplers and pruners.
    """
    target = str(settings.get("_target_"))
    if target in REFUSED:
        raise UserError(f"hydra.sweeper.{slot}._target_={target}: {REFUSED[target]}")
    if target not in CLASSES[slot]:
        hint = did_you_mean(target, set(CLASSES[slot]) - set(REFUSED))
        raise UserError(f"hydra.sweeper.{slot}._target_={target}: must be a {slot} of Optuna{hint}")
    cls = CLASSES[slot][target]
    known = list(inspect.signature(cls).parameters)
    arguments = {key: value for key, value in defaults.items() if key in known}
    for key, value in settings.items():
        if key == "_target_":
            continue
        if key not in known:
            raise UserError(
                f"hydra.sweeper.{slot}.{key}: {cls.__name__} has no such setting{did_you_mean(key, known)}"
            )
        nested = isinstance(value, Mapping) and "_target_" in value
        arguments[key] = construct(slot, value, **defaults) if nested else value
    try:
        return cls(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"hydra.sweeper.{slot} ({cls.__name__}): {str(error).splitlines()[0]}") from error


# -- Hydra's override grammar as a search space: `interval(…)`, `choice(…)`, `range(…)`, `a,b` and `tag(log,…)`


def search_space(overrides: Sequence[Override]) -> dict[str, BaseDistribution]:
    """Return a distribution for each override that names several values; raise UserError if none does."""
    space = {o.get_key_element(): _distribution(o) for o in overrides if o.is_sweep_override()}
    if not space:
        raise UserError(
            "hydra/sweeper=optuna has nothing to search: give a key several values, "
            "as in 'optimizer.lr=tag(log,interval(1e-4,1e-1))'"
        )
    return space


def _distribution(override: Override) -> BaseDistribution:
    value = override.value()
    log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            low, high = value.start, value.end
            if isinstance(low, int) and isinstance(high, int):  # int(interval(1,10)); both ends may be chosen
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low or 0.0), float(high or 0.0), log=log)
        texts = list(override.sweep_string_iterator())
        if isinstance(value, RangeSweep) and len(texts) > 1 and not value.shuffle:
            low, second, high = (float(t) for t in (texts[0], texts[1], texts[-1]))
            if low < second:
                if all(number.is_integer() for number in (low, second, high)):
                    return IntDistribution(int(low), int(high), step=int(second - low), log=log)
                return FloatDistribution(low, high, step=second - low, log=log)
        return CategoricalDistribution(texts)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{override.input_line}: is no space to search ({reason})") from error


def _words(params: Mapping[str, Any]) -> list[str]:
    """Return values as overrides: choices are texts already, and numbers are written in full."""
    return [f"{key}={value}" for key, value in params.items()]


# -- the study in its storage


def _open_storage(settings: SearchSettings, sweep: Path) -> BaseStorage:
    if settings.storage is not None:
        return RDBStorage(settings.storage)
    sweep.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(sweep / "study.journal")))


def open_study(settings: SearchSettings, sweep: Path) -> Study:
    """Open the study that the settings name, or create it. Raises UserError if the storage cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = settings.make_pruner()
    try:
        study = optuna.create_study(
            study_name=settings.study_name,
            storage=_open_storage(settings, sweep),
            direction=optuna.study.StudyDirection[settings.direction.upper()],
            pruner=pruner,
            load_if_exists=True,
        )
    except Exception as error:  # any of a database driver's, an address parser's, a file system's
        place = settings.storage or str(sweep / "study.journal")
        shown = place.partition("@")[2] or place  # without a password
        raise UserError(f"hydra.sweeper.storage={shown}: {str(error).strip().splitlines()[0]}") from error
    if study.direction.name.lower() != settings.direction:
        raise UserError(
            f"hydra.sweeper.direction={settings.direction}: the study {settings.study_name} has "
            f"{study.direction.name.lower()}; choose another hydra.sweeper.study_name"
        )
    return study


def open_trial(settings: SearchSettings, sweep: Path, number: int) -> Trial:
    """Return a trial of an existing study, to report to; it cannot sample."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = _open_storage(settings, sweep)
    study = optuna.load_study(
        study_name=settings.study_name,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(),
        pruner=settings.make_pruner(),
    )
    study_id = storage.get_study_id_from_name(settings.study_name)
    return Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))


class Worker:
    """One process of a study. Other processes see by the lock that it holds whether it is alive."""

    ASKING = timedelta(minutes=1)  # a trial older than this without a worker: its process died while asking

    def __init__(self, sweep: Path) -> None:
        folder = (sweep / ".workers").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.host = socket.gethostname()
        self.path = folder / f"{self.host}-{os.getpid()}-{time.time_ns()}"
        self._lock = FileLock(self.path)
        self.one_at_a_time = FileLock(folder / "asking")  # held while a process of this sweep directory asks

    def __enter__(self) -> Worker:
        self._lock.acquire(timeout=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self.path.unlink(missing_ok=True)

    def sign(self, trial: Trial) -> None:
        """Record in a trial which process runs it."""
        trial.set_user_attr("worker", {"host": self.host, "lock": str(self.path)})

    def is_stale(self, trial: FrozenTrial) -> bool:
        """Return whether a running trial has lost its process."""
        owner = trial.user_attrs.get("worker")
        if owner is None:
            started = trial.datetime_start
            return started is not None and datetime.now() - started > self.ASKING
        path = Path(owner["lock"])
        if path == self.path:
            return False
        if not path.exists():  # its process has ended; or it is on a machine whose disk this one does not see
            return bool(owner["host"] == self.host)
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False


# -- the search


def run_search(settings: SearchSettings, overrides: Sequence[Override], jobs: SweepJobs) -> None:
    """Launch trials until the study has `n_trials`; raise UserError if it cannot be opened or is another search."""
    space = search_space(overrides)
    fixed = [o for o in overrides if not o.is_sweep_override()]
    words = [f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in fixed]
    # what cannot be composed or constructed is an error before there is a study
    first = {k: d.choices[0] if isinstance(d, CategoricalDistribution) else d.low for k, d in space.items()}  # type: ignore[attr-defined]
    jobs.compose([*words, *_words(first)])
    settings.make_sampler(0)
    study = open_study(settings, jobs.folder)
    no_result_depends_on = {f"{group}.{key}" for group, keys in NOT_IDENTITY.items() for key in keys}
    _check_same_search(
        study,
        sorted(w for o, w in zip(fixed, words, strict=True) if o.key_or_group not in no_result_depends_on),
    )
    with Worker(jobs.folder) as worker:
        while True:
            batch: list[Trial] = []
            while len(batch) < settings.n_jobs:
                trial = ask(study, settings, space, worker, wait=not batch)
                if trial is None:
                    break
                batch.append(trial)
            if not batch:
                return
            outcomes = jobs.launch(
                [[*words, *_words(t.params), f"+hydra.job.env_set.{TRIAL}='{t.number}'"] for t in batch],
                first=batch[0].number,
            )
            for trial, outcome in zip(batch, outcomes, strict=True):
                tell(study, trial, outcome)


def _check_same_search(study: Study, words: list[str]) -> None:
    """Raise UserError if the study's trials have other fixed settings; all processes must agree on them."""
    known = study.user_attrs.get("fixed")
    if known is None:
        study.set_user_attr("fixed", words)
    elif known != words:
        differing = sorted(set(known) ^ set(words))
        raise UserError(
            f"the study {study.study_name} was begun with other settings ({', '.join(differing)}): "
            "choose another hydra.sweep.dir or hydra.sweeper.study_name"
        )


def ask(
    study: Study,
    settings: SearchSettings,
    space: Mapping[str, BaseDistribution],
    worker: Worker,
    wait: bool = True,
) -> Trial | None:
    """Return the next trial of the study; None when it has as many as it should.

    Trials that a dead process left running are asked for again first, with the same values. No values are run
    twice: the outcome of a finished trial with the same ones holds for this one, too. Where such a trial is
    running at this moment, other values are asked for, again and again if `wait`; without it the answer is None.
    """
    pause = 0.5  # seconds
    while True:
        with worker.one_at_a_time:
            _requeue_stale_trials(study, worker)
            trials = study.get_trials(deepcopy=False)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            if _count(trials) >= settings.n_trials and not waiting:
                return None
            study.sampler = settings.make_sampler(len(trials))
            try:
                trial = study.ask(dict(space))
            except ValueError as error:
                raise UserError(
                    f"the study {settings.study_name} has another search space ({str(error).splitlines()[0]}): "
                    "choose another hydra.sweep.dir or hydra.sweeper.study_name"
                ) from error
            worker.sign(trial)
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        if _count(earlier) >= settings.n_trials:  # another process without our lock took the last one
            _void(study, trial)
            return None
        duplicates = {
            t.state: t for t in earlier if t.params == trial.params and not t.user_attrs.get("void")
        }
        if TrialState.COMPLETE in duplicates:
            study.tell(trial, duplicates[TrialState.COMPLETE].value)
        elif TrialState.PRUNED in duplicates:
            study.tell(trial, state=TrialState.PRUNED)
        elif TrialState.RUNNING in duplicates:
            _void(study, trial)
            if not wait:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 30)
        else:
            return trial


def tell(study: Study, trial: Trial, outcome: Outcome) -> None:
    """Tell the study how a trial's job ended; raise UserError if runs have no objective."""
    if outcome.state == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif outcome.value is not None:
        study.tell(trial, outcome.value)
    elif outcome.error is not None:
        trial.set_user_attr("error", str(outcome.error))
        study.tell(trial, state=TrialState.FAIL)
    else:
        raise UserError(
            "hydra/sweeper=optuna searches by validation accuracy, and these runs have none: set data.validation"
        )


def _count(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trials count towards n_trials: not those that were asked for again or given back."""
    again = {t.user_attrs.get("retry_of") for t in trials}
    return sum(t.number not in again and not t.user_attrs.get("void") for t in trials)


def _void(study: Study, trial: Trial) -> None:
    """Give a trial back."""
    trial.set_user_attr("void", True)
    study.tell(trial, state=TrialState.FAIL)


def _requeue_stale_trials(study: Study, worker: Worker) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if worker.is_stale(trial):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
