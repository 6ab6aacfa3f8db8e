"""Safe construction of the two things a config may name: an optimizer and a learning-rate schedule.

`_target_` in a config is only a name. It is looked up among modules that are already imported (nothing is
ever imported because a config said so), and what it resolves to must be a class of the slot's kind, whatever
path led there: `torch.optim.sgd.torch.hub.load` is a function, so it is refused. Arguments are plain
numbers, booleans, strings and lists of them, checked against the class's own signature.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zfnet.config.errors import UserError, did_you_mean

SLOTS: dict[str, type] = {"optimizer": Optimizer, "scheduler": LRScheduler}

# What PyTorch takes without a word though it means nothing: whole numbers below these, factors and rates of 0 or less.
_WHOLE = {"step_size": 1, "patience": 0, "cooldown": 0, "T_max": 1, "total_steps": 1, "total_iters": 1}
_POSITIVE = ("factor", "gamma", "max_lr")
_LARGEST = 1e30  # float32 ends at 3e38, and optimizers divide by small numbers

# Given by the program, never by a config.
_INJECTED = {"self", "params", "optimizer", "last_epoch", "verbose"}


def resolve(slot: str, target: Any) -> type:
    """Return the class that `target` names, if it is one that `slot` may construct; raise UserError otherwise."""
    base = SLOTS[slot]
    wanted = f"{slot}._target_={target}: must name a subclass of {base.__module__}.{base.__qualname__}"
    if not isinstance(target, str):
        raise UserError(wanted)
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:cut]))
        if found is not None:
            break
    else:
        raise UserError(f"{wanted}; no imported module holds that name")
    for part in parts[cut:]:
        # vars() and not getattr(): a module's __getattr__ may import or run something
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    if not (isinstance(found, type) and issubclass(found, base) and found is not base):
        raise UserError(f"{wanted}, not {'nothing' if found is None else type(found).__name__}")
    return found


def arguments(
    slot: str, settings: Mapping[str, Any], extra: tuple[str, ...] = ()
) -> tuple[type, dict[str, Any]]:
    """Return the class that `settings` names and its keyword arguments, checked against its signature.

    `extra` names keys that belong to the slot but not to the class; they are left out.
    """
    if "_target_" not in settings:
        raise UserError(f"{slot}._target_ is missing: choose a file of conf/{slot}, as in {slot}=NAME")
    cls = resolve(slot, settings["_target_"])
    parameters = {n: p for n, p in inspect.signature(cls).parameters.items() if n not in _INJECTED}
    keywords: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "_target_" or key in extra:
            continue
        if key not in parameters:
            known = [*parameters, *extra]
            raise UserError(
                f"{slot}.{key}: {cls.__name__} has no such setting{did_you_mean(str(key), known)}"
            )
        keywords[key] = _check_value(f"{slot}.{key}", value, parameters[key].default)
        if slot == "scheduler":
            _check_meaning(key, value)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in keywords:
            raise UserError(f"{slot}.{name} is missing: {cls.__name__} needs it")
    return cls, keywords


def _check_value(key: str, value: Any, default: Any) -> Any:
    """Compare a value's type with the default in the class's signature; lists become tuples where it has one."""
    if isinstance(value, (list, tuple)):
        if key.endswith(".lr"):
            raise UserError(f"{key}={value}: must be a number")
        if not all(_is_number(v) for v in value):
            raise UserError(f"{key}={value}: must be a list of numbers")
        if isinstance(default, tuple) and len(value) != len(default):
            raise UserError(f"{key}={value}: must be a list of {len(default)} numbers")
        return tuple(value) if isinstance(default, tuple) else list(value)
    if not (value is None or isinstance(value, (bool, int, float, str))):
        raise UserError(f"{key}={value}: must be a plain value, not a {type(value).__name__}")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key}={value}: must be true or false")
    elif _is_number(default) or key.endswith(".lr"):
        if not _is_number(value) and not (value == "auto" and key.startswith("scheduler.")):
            raise UserError(f"{key}={value}: must be a number")
        if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
            raise UserError(f"{key}={value}: must be a finite number, at most {_LARGEST:g}")
    elif isinstance(default, tuple):
        raise UserError(f"{key}={value}: must be a list of {len(default)} numbers")
    return value


def _check_meaning(key: str, value: Any) -> None:
    """Refuse what a schedule cannot mean; `auto` and null are somebody else's to decide."""
    if value is None or value == "auto":
        return
    low = _WHOLE.get(key)
    if low is not None and not _is_whole(value, low):
        raise UserError(f"scheduler.{key}={value}: must be a whole number, at least {low}")
    if key == "milestones" and not (isinstance(value, list) and all(_is_whole(v, 1) for v in value)):
        raise UserError(
            f"scheduler.{key}={value}: must be a list of whole numbers, each at least 1, as in [6,8]"
        )
    if key in _POSITIVE and not (_is_number(value) and value > 0):
        raise UserError(f"scheduler.{key}={value}: must be a number greater than 0")


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def build_optimizer(settings: Mapping[str, Any], parameters: Any, fused: bool = False) -> Optimizer:
    """Construct the optimizer; `fused` asks for its one-kernel form where it has one."""
    cls, keywords = arguments("optimizer", settings)
    parameters = list(parameters)
    try:
        if fused and "fused" not in keywords and _has_fused(cls, keywords, parameters[0]):
            keywords["fused"] = True
        return cls(parameters, **keywords)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer ({cls.__name__}): {error}") from error


def _has_fused(cls: Any, keywords: Mapping[str, Any], like: torch.Tensor) -> bool:
    """Return whether a one-kernel form exists on the device of `like`. Some optimizers say so only when they step."""
    if "fused" not in inspect.signature(cls).parameters:
        return False
    parameter = torch.nn.Parameter(torch.zeros(1, device=like.device))
    parameter.grad = torch.zeros(1, device=like.device)
    try:
        cls([parameter], **keywords, fused=True).step()
    except RuntimeError:
        return False
    return True


def build_scheduler(
    settings: Mapping[str, Any], optimizer: Optimizer, length: int, extra: tuple[str, ...]
) -> LRScheduler:
    """Construct the schedule; the value `auto` stands for the run's length in the schedule's own unit."""
    cls, keywords = arguments("scheduler", settings, extra)
    keywords = {key: length if value == "auto" else value for key, value in keywords.items()}
    try:
        return cls(optimizer, **keywords)
    except (TypeError, ValueError) as error:
        raise UserError(f"scheduler ({cls.__name__}): {error}") from error


def check_construction(
    optimizer: Mapping[str, Any], scheduler: Mapping[str, Any], extra: tuple[str, ...]
) -> None:
    """Build both on one dummy parameter, so that a bad value is known before any data is read."""
    _, keywords = arguments("optimizer", optimizer)
    if not keywords.get("lr", 1) > 0:
        raise UserError(f"optimizer.lr={keywords['lr']}: must be greater than 0")
    parameter = torch.nn.Parameter(torch.zeros(1))
    dummy = build_optimizer(optimizer, [parameter])
    parameter.grad = torch.zeros(1)
    try:
        dummy.step()
    except (TypeError, RuntimeError) as error:  # LBFGS wants a closure, SparseAdam sparse gradients
        raise UserError(
            f"optimizer._target_={optimizer['_target_']}: cannot take a plain step ({error})"
        ) from error
    build_scheduler(scheduler, dummy, 100, extra)
