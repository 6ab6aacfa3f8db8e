"""Optuna's search over a space of overrides: ask for a trial, launch it as a job, tell the study its result.

The storage contains the whole state of a study. A killed search therefore continues when it is run again, and several
processes can share one study.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import optuna
from filelock import FileLock, Timeout
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig, OmegaConf
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import BeforeValidator, ValidationInfo

from zfnet.config.errors import UserError, one_line
from zfnet.config.instantiate import instantiate
from zfnet.config.randomness import make_key
from zfnet.config.reading import parse_json, read_bytes
from zfnet.config.schema import NOT_IDENTITY, Checked, NotNegative, Positive, check
from zfnet.runs.directory import RunDirectory, sweep_folder
from zfnet.sweeps.launch import TRIAL, NoObjective, Outcome, SweepJobs

optuna.logging.set_verbosity(optuna.logging.WARNING)

# -- settings, and what they construct


def _settings_of_class(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"choose a file with hydra/sweeper/{info.field_name}=…")
    return value


Target = Annotated[dict[str, Any], BeforeValidator(_settings_of_class)]  # a `_target_` and its arguments


@dataclass(kw_only=True)
class SearchSettings(Checked):
    """The settings in conf/hydra/sweeper/optuna.yaml."""

    n_trials: Positive
    n_jobs: Positive
    direction: Literal["maximize", "minimize"]
    study_name: str
    storage: Optional[str]
    seed: NotNegative
    sampler: Target
    pruner: Target


def read_settings(sweeper: DictConfig) -> SearchSettings:
    """Return the checked settings in Hydra's config; raise UserError naming the key that is wrong."""
    plain: Any = OmegaConf.to_container(sweeper, resolve=True)
    own = {key: value for key, value in plain.items() if key != "params" and not key.startswith("_")}
    return check(SearchSettings, own, "hydra.sweeper")


_BASES = {"sampler": optuna.samplers.BaseSampler, "pruner": optuna.pruners.BasePruner}
_NEEDS_OWN_LOOP = "runs every combination and needs Optuna's own loop: use hydra/sweeper=grid"
REFUSED = {
    "optuna.samplers.CmaEsSampler": "unpickles data from the storage, which can run code",
    "optuna.samplers.BruteForceSampler": _NEEDS_OWN_LOOP,
    "optuna.samplers.GridSampler": _NEEDS_OWN_LOOP,
}


def construct(slot: str, settings: Mapping[str, Any], **defaults: Any) -> Any:
    """Construct the sampler or pruner that `settings` names by `_target_`, and those nested in its arguments.

    defaults: arguments for classes that accept them. Raises UserError for any class but Optuna's samplers and pruners.
    """
    target = str(settings.get("_target_"))
    if target in REFUSED:
        raise UserError(f"hydra.sweeper.{slot}._target_={target}: {REFUSED[target]}")
    if not re.fullmatch(rf"optuna\.{slot}s\.\w+", target):
        raise UserError(f"hydra.sweeper.{slot}._target_={target}: must be a {slot} of Optuna")
    arguments = {
        key: construct(slot, value, **defaults) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in settings.items()
    }
    return instantiate(f"hydra.sweeper.{slot}", arguments, _BASES[slot], ["optuna"], defaults=defaults)


def make_sampler(settings: SearchSettings, trial: int) -> optuna.samplers.BaseSampler:
    """Return the sampler for one trial. Its random numbers depend on the seed and the trial's number only.

    The points of QMC form one sequence over all trials, so its sampler depends on the seed only.
    """
    one_sequence = settings.sampler.get("_target_") == "optuna.samplers.QMCSampler"
    seed = settings.seed if one_sequence else make_key(settings.seed, trial)
    return construct("sampler", settings.sampler, seed=seed)


# -- Hydra's override grammar as a search space: `interval(…)`, `choice(…)`, `range(…)`, `a,b` and `tag(log,…)`


def search_space(overrides: Sequence[Override]) -> dict[str, BaseDistribution]:
    """Return a distribution for each override that names several values; raise UserError if none does."""
    for o in overrides:  # Hydra parses these as text if a bound is not a number
        if not o.is_sweep_override() and re.match(r"\W?(tag|interval|range)\(", o.get_value_element_as_str()):
            raise UserError(f"{o.input_line}: is not a search space; its bounds must be numbers")
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
            if isinstance(low, int) and isinstance(high, int):  # from int(interval(1,10)), which includes both ends
                return IntDistribution(low, high, log=log)
            return FloatDistribution(float(low or 0.0), float(high or 0.0), log=log)
        texts = list(override.sweep_string_iterator())
        if isinstance(value, RangeSweep) and len(texts) > 1 and not value.shuffle:
            first, step = Decimal(texts[0]), Decimal(str(value.step))  # in floats, 0.1 + 0.2 is not 0.3
            last = first + step * (len(texts) - 1)
            if step > 0:
                if first == int(first) and step == int(step):
                    return IntDistribution(int(first), int(last), step=int(step), log=log)
                return FloatDistribution(float(first), float(last), step=float(step), log=log)
        return CategoricalDistribution(texts)
    except ValueError as error:
        raise UserError(f"{override.input_line}: is not a search space ({one_line(error)})") from error


# -- the study in its storage


class _JournalLock(JournalFileSymlinkLock):
    """A journal's lock for writers. `acquire` also removes an incomplete last line, left by a killed process.

    Otherwise the next entry would be appended to that line, and Optuna cannot read a journal with a damaged line.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path

    def acquire(self) -> bool:
        acquired = super().acquire()
        with open(self.path, "r+b") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return acquired


def _open_storage(settings: SearchSettings, sweep: Path) -> BaseStorage:
    sweep.mkdir(parents=True, exist_ok=True)
    if settings.storage:
        return get_storage(settings.storage)
    path = sweep / "study.journal"
    if path.is_symlink():
        raise UserError(f"{path}: is a link, so the study would be written elsewhere: replace it")
    try:
        for line in read_bytes(path).splitlines(keepends=True) if path.exists() else ():
            if line.endswith(b"\n"):  # another process may be writing the last one
                parse_json(line)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return JournalStorage(JournalFileBackend(str(path), _JournalLock(path)))


def open_study(settings: SearchSettings, sweep: Path) -> Study:
    """Open the study that the settings name, or create it. Raises UserError if the storage cannot be used."""
    pruner = construct("pruner", settings.pruner)
    try:
        study = optuna.create_study(
            study_name=settings.study_name,
            storage=_open_storage(settings, sweep),
            direction=settings.direction,
            pruner=pruner,
            load_if_exists=True,
        )
    except UserError:
        raise
    except Exception as error:  # from a database driver, a URL parser or a file system
        address = settings.storage or str(sweep / "study.journal")
        shown = address.partition("@")[2] or address  # without a password
        raise UserError(f"hydra.sweeper.storage={shown}: {one_line(error)}") from error
    if study.direction.name.lower() != settings.direction:
        raise UserError(
            f"hydra.sweeper.direction={settings.direction}: the study {settings.study_name} has direction "
            f"{study.direction.name.lower()}; choose another hydra.sweeper.study_name"
        )
    return study


def report_to_trial(hydra: Any) -> Callable[[float, int], bool] | None:
    """Return a function that reports (validation accuracy, epoch) to a job's trial and returns whether to prune.

    Return None if the search does not prune. hydra: Hydra's own config of the job
    """
    settings = read_settings(hydra.sweeper)
    if settings.pruner.get("_target_") == "optuna.pruners.NopPruner":
        return None
    storage = _open_storage(settings, sweep_folder(hydra))
    study = optuna.load_study(
        study_name=settings.study_name,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(),  # nothing is sampled here
        pruner=construct("pruner", settings.pruner),
    )
    study_id, number = storage.get_study_id_from_name(settings.study_name), int(hydra.job.env_set[TRIAL])
    trial = Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def report(value: float, epoch: int) -> bool:
        trial.report(value, epoch)
        return trial.should_prune()

    return report


class Worker:
    """One process that works on a study. Its lock shows other processes that it is alive."""

    ASKING = timedelta(minutes=1)  # an older running trial without a worker is stale: its process died while asking

    def __init__(self, sweep: Path) -> None:
        folder = (sweep / ".workers").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        self.host = socket.gethostname()
        self.path = folder / f"{self.host}-{os.getpid()}-{time.time_ns()}"
        self.alive = FileLock(self.path)
        self.asking = FileLock(folder / "asking")  # one process of a sweep asks at a time

    def is_stale(self, trial: FrozenTrial) -> bool:
        """Return whether the process of a running trial has died."""
        name = trial.user_attrs.get("worker")
        if name is None:
            started = trial.datetime_start
            return started is not None and datetime.now() - started > self.ASKING
        path = Path(name)
        if path == self.path:
            return False
        if path.parent.name != self.path.parent.name:  # a storage from elsewhere could name any file to lock
            return True
        if not path.exists():  # the process has ended, or it runs on a machine with another file system
            return path.name.rsplit("-", 2)[0] == self.host
        try:
            with FileLock(path, timeout=0):
                return True
        except Timeout:
            return False


# -- the search


def run_search(overrides: Sequence[Override], jobs: SweepJobs) -> None:
    """Launch trials until the study has `n_trials`; raise UserError if it cannot be opened or has other settings."""
    settings = read_settings(jobs.config.hydra.sweeper)
    space = search_space(overrides)
    fixed = {o.get_key_element(): o.get_value_element_as_str() for o in overrides if not o.is_sweep_override()}
    # before creating a study, check each key's choices or limits, one key at a time
    ends = {k: d.choices if isinstance(d, CategoricalDistribution) else (d.low, d.high) for k, d in space.items()}  # type: ignore[attr-defined]
    first = fixed | {key: values[0] for key, values in ends.items()}
    rest = [first | {key: value} for key, values in ends.items() for value in values[1:]]
    jobs.check([_as_overrides(values) for values in [first, *rest]])
    make_sampler(settings, 0)
    study = open_study(settings, jobs.folder)
    _check_same_search(study, fixed, space)
    worker = Worker(jobs.folder)
    with worker.alive:
        while True:
            batch: list[Trial] = []
            while len(batch) < settings.n_jobs and (trial := ask(study, settings, space, worker, wait=not batch)):
                batch.append(trial)
            if not batch:
                return
            # only this search's keys: a storage from elsewhere could contain others, such as imports
            chosen = [{key: trial.params[key] for key in space} for trial in batch]
            given = [
                _as_overrides({**fixed, **values, f"+hydra.job.env_set.{TRIAL}": f"'{trial.number}'"})
                for trial, values in zip(batch, chosen, strict=True)
            ]
            outcomes = jobs.launch(given, first=batch[0].number)
            problems = [problem_of(study, space, outcome, jobs.folder) for outcome in outcomes]
            for trial, outcome, problem in zip(batch, outcomes, problems, strict=True):
                if problem is not None:
                    outcome = replace(outcome, state="failed", value=None, error=problem)
                tell(study, trial, outcome)
            for problem in filter(None, problems):
                raise problem


def _as_overrides(params: Mapping[str, Any]) -> list[str]:
    """Return values as overrides. Choices are text already; numbers are written with all digits."""
    return [f"{key}={value}" for key, value in params.items()]


def _check_same_search(study: Study, fixed: Mapping[str, str], space: Mapping[str, BaseDistribution]) -> None:
    """Record the fixed settings in a new study; raise UserError if the study has other ones, or searches other keys."""
    not_identity = {f"{group}.{key}" for group, keys in NOT_IDENTITY.items() for key in keys}
    given = sorted(_as_overrides({k: v for k, v in fixed.items() if k.lstrip("+~") not in not_identity}))
    known = study.user_attrs.get("fixed")
    if known is None:
        study.set_user_attr("fixed", given)
    elif known != given:
        differing = sorted(set(known) ^ set(given))
        raise UserError(
            f"the study {study.study_name} was begun with other settings ({', '.join(differing)}): "
            "choose another hydra.sweep.dir or hydra.sweeper.study_name"
        )
    wanted = {key: _kind(distribution) for key, distribution in space.items()}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        searched = {key: _kind(distribution) for key, distribution in trial.distributions.items()}
        if differing := [key for key in searched | wanted if searched.get(key) != wanted.get(key)]:
            raise UserError(
                f"the study {study.study_name} was begun with another search space ({', '.join(differing)}): "
                "choose another hydra.sweep.dir or hydra.sweeper.study_name"
            )


def _kind(distribution: BaseDistribution) -> tuple[Any, ...]:
    """Return what must stay the same in a study; the limits of numbers may change."""
    return type(distribution), *(getattr(distribution, name, None) for name in ("log", "choices"))


def problem_of(study: Study, space: Iterable[str], outcome: Outcome, folder: Path) -> UserError | None:
    """Return an error that ends the search, because later trials would have it too; None if there is none."""
    if isinstance(outcome.error, NoObjective):
        return outcome.error
    if outcome.value is None and outcome.error is None and outcome.state != "pruned":
        return NoObjective()
    return other_images(study, space, RunDirectory(folder / outcome.name))


def other_images(study: Study, space: Iterable[str], run: RunDirectory) -> UserError | None:
    """Return an error if a trial was trained on other images than earlier trials; None if the search varies data."""
    known, now = study.user_attrs.get("data_fingerprint"), run.environment.get("data_fingerprint")
    if now is None or any(re.match(r"\+*data(?!\.batch_size)\b", key) for key in space):
        return None
    if known is None:
        study.set_user_attr("data_fingerprint", now)
    if known in (None, now):
        return None
    return UserError(
        f"{run.folder} was trained on different images from the earlier trials of the study {study.study_name}: "
        "choose another hydra.sweep.dir or hydra.sweeper.study_name"
    )


def ask(
    study: Study, settings: SearchSettings, space: Mapping[str, BaseDistribution], worker: Worker, wait: bool
) -> Trial | None:
    """Return the next trial of the study; None when it has `n_trials`.

    Trials that a dead process left running are repeated first, with the same values. The same values never run twice:
    a trial with the values of a finished one copies its outcome. If a trial with the same values is running, ask again
    until the study proposes other values (`wait`), or return None.
    """
    pause = 0.5  # seconds
    while True:
        with worker.asking:
            for stale in filter(worker.is_stale, study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))):
                study.tell(stale.number, state=TrialState.FAIL, skip_if_finished=True)
                study.enqueue_trial(stale.params, user_attrs={"retry_of": stale.number})
            trials = study.get_trials(deepcopy=False)
            waiting = any(t.state == TrialState.WAITING for t in trials)
            if _count_trials(trials) >= settings.n_trials and not waiting:
                return None
            study.sampler = make_sampler(settings, len(trials))
            try:
                trial = study.ask(dict(space))
            except ValueError as error:
                raise UserError(
                    f"the study {settings.study_name} has another search space ({one_line(error)}): "
                    "choose another hydra.sweep.dir or hydra.sweeper.study_name"
                ) from error
            trial.set_user_attr("worker", str(worker.path))
        earlier = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        if _count_trials(earlier) >= settings.n_trials:  # a process with another sweep directory took the last
            _mark_void(study, trial)
            return None
        duplicates = {t.state: t for t in earlier if t.params == trial.params and "void" not in t.user_attrs}
        if TrialState.COMPLETE in duplicates:
            study.tell(trial, duplicates[TrialState.COMPLETE].value)
        elif TrialState.PRUNED in duplicates:
            study.tell(trial, state=TrialState.PRUNED)
        elif TrialState.RUNNING in duplicates:
            _mark_void(study, trial)
            if not wait:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 30)
        else:
            return trial


def tell(study: Study, trial: Trial, outcome: Outcome) -> None:
    """Tell the study how a trial's job ended."""
    if outcome.state == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif outcome.value is not None:
        study.tell(trial, outcome.value)
    else:
        trial.set_user_attr("error", str(outcome.error))
        study.tell(trial, state=TrialState.FAIL)


def _count_trials(trials: Sequence[FrozenTrial]) -> int:
    """Return how many trials count towards n_trials: all except those that were repeated or voided."""
    again = {t.user_attrs.get("retry_of") for t in trials}
    return sum(t.number not in again and "void" not in t.user_attrs for t in trials)


def _mark_void(study: Study, trial: Trial) -> None:
    """Mark a trial as void, so that it does not count towards n_trials."""
    trial.set_user_attr("void", True)
    study.tell(trial, state=TrialState.FAIL)
