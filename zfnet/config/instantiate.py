"""Safe instantiation of classes that a config names by `_target_`: models, data sets, losses, optimizers, callbacks …

A `_target_` is only a name. It is looked up in this package, in the parts of PyTorch and torchvision that belong to the
slot, and in the packages that the command imports (`imports=[my_lab]`); nothing else is imported for a config. It must
resolve to a class of the slot's type, and that class must be defined in one of those places:
`torch.optim.sgd.torch.hub.load` is a function, so it is refused. Arguments are plain numbers, booleans, strings, lists
and mappings of them, checked against the class's own signature.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zfnet.config.errors import UserError, did_you_mean, one_line, place_of

# Modules with classes that a slot can use without `imports`. A class must be defined there, not only imported there.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "model": ("torchvision.models",),
    "loss": ("torch.nn.modules.loss",),
    "augment": ("torchvision.transforms.v2",),
    "optimizer": ("torch.optim",),
    "scheduler": ("torch.optim.lr_scheduler",),
    "hydra": ("hydra", "hydra_plugins"),
}
# Slots that accept a function as well as a class, such as torchvision.models.vgg11.
_FUNCTION_SLOTS = ("model",)
# Arguments with which torchvision's functions download weights.
_REFUSED_ARGUMENTS = {"model": ("weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress")}
# PyTorch silently accepts meaningless values: whole numbers below these limits, factors of 0 or less, negative decays …
_MINIMUMS = {"step_size": 1, "patience": 0, "cooldown": 0, "T_max": 1, "total_steps": 1, "total_iters": 1}
_POSITIVE = ("factor", "gamma", "max_lr", "lr", "div_factor", "final_div_factor")
_NOT_NEGATIVE = ("momentum", "weight_decay", "eta_min", "min_lr", "label_smoothing")
# Arguments that the program passes and a config must not set.
_PASSED_BY_PROGRAM = {"optimizer": ("params",), "scheduler": ("optimizer", "last_epoch")}
_INT = r"<class 'int'>|int|(typing\.)?Optional\[int\]|int \| None"  # annotations of whole numbers
_TEXT = r"<class 'str'>|str|(typing\.)?Optional\[str\]|str \| None"  # annotations of text
_LARGEST = 1e30  # float32 overflows at 3e38, and optimizers divide by small numbers


def resolve(slot: str, target: Any, base: type, imports: Sequence[str] = ()) -> Any:
    """Return the class that `target` names, if `slot` may instantiate it; raise UserError otherwise.

    slot: the key with the `_target_`, such as optimizer or callbacks.ema
    base: the class that it must derive from
    imports: the packages that the command trusts
    """
    group = slot.split(".")[0]
    wanted = f"{slot}._target_={target}: must name a subclass of {base.__module__}.{base.__qualname__}"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise UserError(wanted)
    package = target.split(".")[0]
    places = ("zfnet", *BUILT_IN.get(group, ()), *imports)
    if not any(_is_inside(package, place.split(".")[0]) for place in places):
        for place in places:
            if isinstance(getattr(sys.modules.get(place), target, None), type):
                raise UserError(f"{slot}._target_={target}: did you mean '{place}.{target}'?")
        raise UserError(
            f"{slot}._target_={target}: the package {package} is not one that this command imports; if you trust it, "
            f"add imports=[{package}]"
        )
    obj = _look_up(target, [place for place in places if _is_inside(place, package)], package in imports)
    if obj is None:
        module = target.rpartition(".")[0]
        names = [
            f"{module}.{name}"
            for name, value in vars(sys.modules.get(module, object)).items()
            if (isinstance(value, type) and issubclass(value, base))
            or (group in _FUNCTION_SLOTS and inspect.isfunction(value))
        ]
        hint = did_you_mean(target, names)
        raise UserError(f"{wanted}; there is no such name{hint if 'did you mean' in hint else ''}")
    where = str(getattr(obj, "__module__", ""))
    if any(_is_inside(where, place) for place in places):
        if isinstance(obj, type) and issubclass(obj, base) and obj is not base:
            return obj
        if group in _FUNCTION_SLOTS and inspect.isfunction(obj) and _makes_models(obj, where, imports):
            return obj
    raise UserError(f"{wanted}, not {obj.__name__ if isinstance(obj, type) else type(obj).__name__}")


def _makes_models(function: Any, where: str, imports: Sequence[str]) -> bool:
    """Return whether a function may make a model: it is in a trusted package, or makes a classifier of torchvision."""
    if any(_is_inside(where, package) for package in imports):
        return True
    if not _is_inside(where, "torchvision.models"):
        return False
    import torchvision  # imported only here, because it takes half a second

    return function.__name__ in torchvision.models.list_models(module=torchvision.models)


def _is_inside(module: str, place: str) -> bool:
    return module == place or module.startswith(place + ".")


def _look_up(target: str, places: Sequence[str], trusted: bool) -> Any:
    """Import the module of `target` if it is in `places`, or in a package of them, and return the object or None."""
    parts, obj, rest = target.split("."), None, 0
    for cut in range(1, len(parts)):
        name = ".".join(parts[:cut])
        if not any(_is_inside(name, place) or _is_inside(place, name) for place in places):
            break
        try:
            obj, rest = sys.modules.get(name) or importlib.import_module(name), cut
        except ModuleNotFoundError as error:
            if error.name != name and not name.startswith(f"{error.name}."):  # one of the module's own imports
                raise UserError(f"{target} cannot be imported: {error}; install it first") from error
            if cut == 1:
                place = "install it, put it next to run.py, or add its folder to PYTHONPATH"
                raise UserError(f"{target} cannot be imported ({error}): {place}") from error
            break
        except Exception as error:
            raise UserError(f"{target} cannot be imported: {type(error).__name__}: {error}") from error
    for part in parts[rest:]:
        if obj is None:
            return None
        # vars() instead of getattr(), because a module's __getattr__ can run code
        obj = getattr(obj, part, None) if trusted else vars(obj).get(part) if hasattr(obj, "__dict__") else None
    return obj


def instantiate(
    slot: str,
    settings: Mapping[str, Any],
    base: type,
    imports: Sequence[str] = (),
    *,
    args: Sequence[Any] = (),
    defaults: Mapping[str, Any] | None = None,
    own: Sequence[str] = (),
    construct: Callable[..., Any] | None = None,
) -> Any:
    """Return an object of the class that `settings` names; raise UserError with the key or the class's own message.

    args: positional arguments that the program passes; defaults: keyword arguments that it passes if the class takes
    them and the config does not set them; own: keys that belong to the slot and not to the class
    construct: function that makes the object from the class and its keyword arguments; by default the class is called
    """
    cls, keywords = arguments(slot, settings, base, imports, num_args=len(args), own=own)
    parameters = inspect.signature(cls).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in (defaults or {}).items():
        if key not in keywords and (key in parameters or takes_all):
            keywords[key] = value
    check_complete(slot, cls, keywords, num_args=len(args))
    try:
        made = construct(cls, keywords) if construct else cls(*args, **keywords)
    except UserError:
        raise
    except Exception as error:  # a class can raise any exception about its arguments
        values = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "_target_")
        raise UserError(
            f"{slot} ({cls.__name__}): {one_line(error)}{place_of(error)} ({values or 'no arguments'})"
        ) from error
    if not isinstance(made, base):
        raise UserError(f"{slot}._target_={settings['_target_']}: makes a {type(made).__name__}, not a {base.__name__}")
    return made


def check_complete(slot: str, cls: Any, keywords: Mapping[str, Any], num_args: int = 0) -> None:
    """Raise UserError if a required argument is not in `keywords`; the first `num_args` are passed by position."""
    for key, p in list(inspect.signature(cls).parameters.items())[num_args:]:
        optional = p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if not optional and key not in keywords and key not in _PASSED_BY_PROGRAM.get(slot.split(".")[0], ()):
            raise UserError(f"{slot}.{key} is missing: {cls.__name__} needs it")


def arguments(
    slot: str,
    settings: Mapping[str, Any],
    base: type,
    imports: Sequence[str] = (),
    *,
    num_args: int = 0,
    own: Sequence[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """Return the class that `settings` names and its keyword arguments, checked against its signature."""
    if not isinstance(settings, Mapping) or "_target_" not in settings:
        raise UserError(f"{slot}._target_ is missing: name a class, as the files in conf/{slot.split('.')[0]} do")
    cls = resolve(slot, settings["_target_"], base, imports)
    given = _PASSED_BY_PROGRAM.get(slot.split(".")[0], ())
    parameters = {k: p for k, p in list(inspect.signature(cls).parameters.items())[num_args:] if k not in given}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "_target_" or key in own:
            continue
        if key in given or (key not in parameters and not takes_all):
            raise UserError(
                f"{slot}.{key}: {cls.__name__} has no such setting{did_you_mean(str(key), [*parameters, *own])}"
            )
        if key in _REFUSED_ARGUMENTS.get(slot, ()) and value is not None:
            raise UserError(f"{slot}.{key}={value}: start from weights with trainer.init_from=… instead")
        if key != "schedulers" and "_target_" in str(value):
            raise UserError(f"{slot}.{key}={value}: must be a plain value, because arguments are not instantiated")
        fixed = _is_inside(str(getattr(cls, "__module__", "")), "torch")
        keywords[key] = _check_value(f"{slot}.{key}", value, parameters.get(key), fixed)
        _check_meaning(slot, str(key), value)
        whole = key in parameters and re.fullmatch(_INT, str(parameters[key].annotation))
        if whole and keywords[key] is not None and not (is_number(value) and float(value).is_integer()):
            raise UserError(f"{slot}.{key}={value}: must be a whole number")
    return cls, keywords


def _check_value(key: str, value: Any, parameter: inspect.Parameter | None, fixed: bool) -> Any:
    """Check a value's type against the default in the class's signature; if that is a tuple, convert a list to a tuple.

    fixed: whether a list must have as many values as the default, such as the betas of PyTorch's optimizers
    """
    default = parameter.default if parameter is not None else inspect.Parameter.empty
    annotation = str(parameter.annotation) if parameter is not None else ""
    optional = default is None or re.search("None|Optional|Any", annotation)
    if value is None and optional and not key.endswith(".lr"):
        return None
    if value is None and fixed and parameter is not None and default is inspect.Parameter.empty:
        raise UserError(f"{key}=null: needs a value")  # PyTorch's schedules would fail only after an epoch
    if re.fullmatch(_TEXT, annotation) and not isinstance(value, str):
        raise UserError(f"{key}={value}: must be text")
    if isinstance(default, (list, tuple)):
        kind = next((k for k, fits in _ITEM_KINDS.items() if default and all(map(fits, default))), "values")
        is_list = isinstance(value, (list, tuple)) and (len(value) == len(default) or not fixed)
        if not is_list or not all(map(_ITEM_KINDS.get(kind, lambda _: True), value)):
            raise UserError(f"{key}={value}: must be a list of {f'{len(default)} ' if fixed else ''}{kind}")
        return tuple(value) if isinstance(default, tuple) else list(value)
    if isinstance(value, (list, tuple)):
        if key.endswith(".lr") or is_number(default):
            raise UserError(f"{key}={value}: must be a number")
        return list(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key}={value}: must be true or false")
    elif is_number(default) or key.endswith(".lr"):
        if not (is_number(value) or (value == "auto" and key.startswith("scheduler"))):
            raise UserError(f"{key}={value}: must be a number")
        if isinstance(value, (int, float)) and not abs(value) <= _LARGEST:
            raise UserError(f"{key}={value}: must be a finite number, at most {_LARGEST:g}")
    return value


def _check_meaning(slot: str, key: str, value: Any) -> None:
    """Raise UserError for a value that an optimizer, schedule or loss cannot use; other code checks `auto` and null."""
    if key in _NOT_NEGATIVE and is_number(value) and value < 0:
        raise UserError(f"{slot}.{key}={value}: must be at least 0")
    if value is None or value == "auto" or slot.split(".")[0] not in ("optimizer", "scheduler"):
        return
    low = _MINIMUMS.get(key)
    if low is not None and not _is_whole(value, low):
        raise UserError(f"{slot}.{key}={value}: must be a whole number, at least {low}")
    if key == "milestones" and not (isinstance(value, list) and all(_is_whole(v, 1) for v in value)):
        raise UserError(f"{slot}.{key}={value}: must be a list of whole numbers, each at least 1, as in [6,8]")
    if key in _POSITIVE and not (is_number(value) and value > 0):
        raise UserError(f"{slot}.{key}={value}: must be a number greater than 0")


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# kinds of list items; a list must have items of the same kind as the default
_ITEM_KINDS: dict[str, Callable[[Any], bool]] = {"numbers": is_number, "text": lambda value: isinstance(value, str)}
