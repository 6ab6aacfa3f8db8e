"""Hydra's override grammar as a search space: `interval(…)`, `choice(…)`, `range(…)`, `a,b` and `tag(log,…)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from zfnet.config.errors import UserError
from zfnet.config.schema import NOT_IDENTITY

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


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
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value, line = override.value(), override.input_line
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
        raise UserError(f"{line}: is no space to search ({str(error).splitlines()[0]})") from error


def fixed_overrides(overrides: Sequence[Override]) -> list[str]:
    """Return the overrides that all trials share, in the form in which jobs take them."""
    return [
        f"{o.get_key_element()}={o.get_value_element_as_str()}"
        for o in overrides
        if not o.is_sweep_override()
    ]


def what_counts(fixed: Sequence[str]) -> list[str]:
    """Return those overrides that a result depends on, sorted: two processes of one study must agree on them."""
    idle = {f"{group}.{key}" for group, keys in NOT_IDENTITY.items() for key in keys}
    return sorted(word for word in fixed if word.partition("=")[0].lstrip("+~") not in idle)


def job_overrides(params: Mapping[str, Any]) -> list[str]:
    """Return a trial's values as overrides: choices are texts already, and numbers are written in full."""
    return [f"{key}={value}" for key, value in params.items()]


def any_values(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return one value of each key, to see whether a job can be composed at all."""
    return {key: part.choices[0] if hasattr(part, "choices") else part.low for key, part in space.items()}
