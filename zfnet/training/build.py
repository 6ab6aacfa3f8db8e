"""Build the objects of a training from a config: loss, optimizer, schedule, transforms, callbacks and loggers."""

import inspect
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from zfnet.config.errors import UserError, did_you_mean, log, one_line, place_of
from zfnet.config.instantiate import arguments, check_complete, instantiate, is_number, resolve
from zfnet.config.randomness import seeded_generators
from zfnet.config.schema import Config, DatasetData, ModelConfig
from zfnet.data import Batches, ImageSet, known_classes
from zfnet.data.batches import apply_transforms
from zfnet.model.build import build_model, check_logits, freeze, has_batch_norm, load_initial_weights
from zfnet.model.zfnet import ZFNet
from zfnet.training.checkpoint import pack
from zfnet.training.device import Runtime
from zfnet.training.loggers import Logger
from zfnet.training.processes import SINGLE_PROCESS, World
from zfnet.training.schedule import OWN_KEYS, Schedule, check_interval, schedule_span, steps_by_batch
from zfnet.training.state import Callback, TrainingState, check_columns, measured_columns, set_optimizer_mode

_BUILT_IN_CALLBACKS = ("ema", "filter_renormalization")  # their state has these names in checkpoints
GROUP_KEYS = ("match", "ndim", "lr_scale")  # keys of a parameter group that are not the optimizer's


class SummedLoss(nn.Module):
    """Sums a loss over the images of a batch, so that the sums of the batch's chunks add up to the whole.

    A class with a `reduction` argument is constructed with `sum`; any other class must return the batch's mean.
    """

    def __init__(self, loss: nn.Module, is_mean: bool) -> None:
        super().__init__()
        self.loss, self.is_mean = loss, is_mean

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses of logits [B, C] with labels [B]."""
        if not len(labels):  # a short batch can have no image for this process; a mean over none is NaN
            return logits.sum() * 0
        value: Tensor = self.loss(logits, labels)
        return value * len(labels) if self.is_mean else value


def build_loss(config: Config, counts: Sequence[int]) -> SummedLoss:
    """Return the loss that `config.loss` names; raise UserError if it does not give one number for a batch.

    counts: training images of each class, for loss.weight=balanced
    """
    cls = resolve("loss", config.loss.get("_target_"), nn.Module, config.imports)
    sums = "reduction" in inspect.signature(cls).parameters
    if sums and "loss.reduction" in config.overridden and config.loss.get("reduction") != "sum":  # old records set it
        raise UserError(f"loss.reduction={config.loss['reduction']}: must be sum, because the loop computes the mean")
    # leave out a weight of null, because a user's own class may not accept the argument
    settings = {k: v for k, v in config.loss.items() if (k, v) != ("weight", None)}
    settings |= {"reduction": "sum"} if sums else {}
    weight, defaults = settings.get("weight"), {}
    if weight == "balanced":
        weight = balanced_weights(counts)
    numbers = weight if isinstance(weight, list) and all(map(is_number, weight)) else [1]
    if not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
        raise UserError(f"loss.weight={weight}: must be 0 or more for each class, above 0 for one, and finite")
    if weight is not None and "weight" in inspect.signature(cls).parameters:
        del settings["weight"]
        try:
            defaults = {"weight": torch.tensor(weight, dtype=torch.float32)}
        except (TypeError, ValueError) as error:
            problem = "must be a number for each class, as in [1,2,1], balanced or null"
            raise UserError(f"loss.weight={weight}: {problem}") from error
    loss = instantiate("loss", settings, nn.Module, config.imports, defaults=defaults)
    if any(True for _ in loss.parameters()):
        raise UserError(f"loss ({cls.__name__}): has parameters of its own, which the optimizer would not train")
    return SummedLoss(loss, is_mean=not sums)


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """Return a weight for each class, inversely proportional to its number of images, with mean 1 over the images."""
    present = sum(count > 0 for count in counts)
    return [sum(counts) / (present * count) if count else 0.0 for count in counts]


def build_transforms(config: Config) -> list[nn.Module]:
    """Return the operations of `augment.transforms`, in order."""
    return [
        instantiate(f"augment.transforms.{number}", settings, nn.Module, config.imports)
        for number, settings in enumerate(config.augment.transforms)
    ]


def build_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks that `config.callbacks` names, in its order; raise UserError for an unknown hook."""
    hooks = [hook for hook in dir(Callback) if hook.startswith("on_")]
    made = []
    for name, settings in config.callbacks.items():
        if name in _BUILT_IN_CALLBACKS:
            raise UserError(f"callbacks.{name}: the program's own callback has this name; choose another")
        callback = instantiate(f"callbacks.{name}", settings, Callback, config.imports)
        callback.name = name
        for method in dir(callback):  # a misspelt hook would never be called
            if method.startswith("on_") and method not in hooks and callable(getattr(callback, method)):
                raise UserError(f"callbacks.{name}: there is no hook {method}{did_you_mean(method, hooks)}")
        made.append(callback)
    return made


def build_loggers(config: Config) -> dict[str, Logger]:
    """Return the loggers that `config.logger` names, by name."""
    return {name: instantiate(f"logger.{name}", part, Logger, config.imports) for name, part in config.logger.items()}


# -- optimizer


def build_optimizer(config: Config, model: nn.Module, fused: bool = False) -> Optimizer:
    """Return the optimizer of the model's trainable parameters; `fused`: use fused kernels if it has them."""

    def construct(cls: Any, keywords: dict[str, Any]) -> Optimizer:
        groups = list(parameter_groups(config, model, keywords.get("lr")))
        if fused and "fused" not in keywords and _has_fused(cls, keywords, groups[0]["params"][0].device):
            keywords["fused"] = True
        return cls(groups if len(groups) > 1 or len(groups[0]) > 1 else groups[0]["params"], **keywords)

    return instantiate(
        "optimizer", config.optimizer, Optimizer, config.imports, own=("param_groups",), construct=construct
    )


def parameter_groups(config: Config, model: nn.Module, lr: float | None) -> Iterator[dict[str, Any]]:
    """Yield the groups of `optimizer.param_groups`, then a group of all other parameters; raise UserError.

    Each rule selects parameters by `match` (a regular expression searched in the name) and/or `ndim` (the number of
    dimensions: biases and norms have 1). It sets arguments of the optimizer, such as weight_decay, or `lr_scale`, a
    factor on the learning rate. A parameter belongs to the first rule that matches it.
    """
    rules, target = config.optimizer.get("param_groups") or [], config.optimizer.get("_target_")
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(True for _ in model.parameters()):
        raise UserError(f"model ({type(model).__name__}): has no parameters to train")
    if not rest:
        raise UserError(f"trainer.freeze={config.trainer.freeze}: leaves no parameters to train")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise UserError(f"optimizer.param_groups={rules}: must be a list such as [{{ndim: 1, weight_decay: 0}}]")
    if rules:
        resolve("optimizer", target, Optimizer, config.imports)  # report an unknown class first
    for number, rule in enumerate(rules):
        slot = f"optimizer.param_groups.{number}"
        if not {"match", "ndim"} & rule.keys():
            raise UserError(f"{slot}={rule}: selects no parameters; set match or ndim")
        try:
            pattern = re.compile(str(rule.get("match", "")))
        except re.error as error:
            raise UserError(f"{slot}.match={rule['match']}: {error}") from error
        chosen = {k: p for k, p in rest.items() if pattern.search(k) and rule.get("ndim", p.ndim) == p.ndim}
        rest = {name: p for name, p in rest.items() if name not in chosen}
        if not chosen:
            raise UserError(f"{slot}={rule}: no parameter matches")
        settings = {key: value for key, value in rule.items() if key not in GROUP_KEYS}
        group = arguments(slot, {**settings, "_target_": target}, Optimizer, config.imports)[1]
        if "lr_scale" in rule:
            if lr is None or not is_number(rule["lr_scale"]) or rule["lr_scale"] <= 0:
                scale = rule["lr_scale"]
                raise UserError(f"{slot}.lr_scale={scale}: must be a number above 0, and optimizer.lr must be set")
            group["lr"] = lr * rule["lr_scale"]
        yield {"params": list(chosen.values()), **group}
    if rest:
        yield {"params": list(rest.values())}


def _has_fused(cls: Any, keywords: Mapping[str, Any], device: torch.device) -> bool:
    """Return whether the optimizer has fused kernels on this device. Some optimizers raise an error only in `step`."""
    if "fused" not in inspect.signature(cls).parameters:
        return False
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros(1, device=device)
    try:
        cls([parameter], **keywords, fused=True).step()
    except RuntimeError:
        return False
    return True


# -- schedule


def build_scheduler(
    settings: Mapping[str, Any], optimizer: Optimizer, length: int, imports: Sequence[str] = ()
) -> LRScheduler:
    """Return the learning-rate schedule; the value `auto` means `length`, the run's length in the schedule's unit.

    A schedule that chains others (`SequentialLR`, `ChainedScheduler`) names them in `schedulers`, each by `_target_`.
    `max_lr` and `base_lr` apply to groups without an `lr_scale` and are multiplied by it for other groups (PyTorch
    would use the same value for all groups).
    """
    usual = optimizer.defaults.get("lr")
    scales = [group["lr"] / usual for group in optimizer.param_groups] if usual else [1.0]

    def for_each_group(keywords: dict[str, Any]) -> dict[str, Any]:
        rates = {k: keywords[k] for k in ("max_lr", "base_lr") if is_number(keywords.get(k)) and {*scales} != {1.0}}
        return keywords | {key: [rate * scale for scale in scales] for key, rate in rates.items()}

    def build(slot: str, part: Mapping[str, Any]) -> LRScheduler:
        values = {key: length if value == "auto" else value for key, value in part.items()}
        chain = values.get("schedulers")
        if not isinstance(chain, list):
            return instantiate(
                *(slot, values, LRScheduler, imports),
                args=(optimizer,),
                own=OWN_KEYS,
                construct=lambda cls, keywords: cls(optimizer, **for_each_group(keywords)),
            )
        values["schedulers"] = [build(f"{slot}.schedulers.{n}", inner) for n, inner in enumerate(chain)]
        return instantiate(slot, values, LRScheduler, imports, own=OWN_KEYS, defaults={"optimizer": optimizer})

    made = build("scheduler", settings)
    if isinstance(made, ReduceLROnPlateau) and steps_by_batch(settings):
        raise UserError("scheduler.interval=step: a plateau schedule steps once an epoch, on trainer.monitor")
    return made


# -- checks before any data is read


@torch.inference_mode(False)  # a caller can have disabled gradients
@seeded_generators(torch.device("cpu"))  # user code can draw random numbers
def check_recipe(config: Config) -> None:
    """Build every object of a training at a small size; raise UserError if one cannot be built."""
    classes, size = known_classes(config.data), config.data.image_size
    if isinstance(config.model, ModelConfig):
        with torch.device("meta"):  # shapes only
            model: nn.Module = ZFNet(2, size, config.model)
    else:
        model = build_model(config.model, classes, size, config.imports)
        check_logits(model, classes, size, training=True)
    freeze(model, config.trainer.freeze)
    on_gpu = torch.cuda.is_available() if config.trainer.device == "auto" else config.trainer.device != "cpu"
    _check_batch_norm(model, config.trainer.devices, on_gpu)
    check_interval(config.scheduler, schedule_span(config.to_dict())[1])
    check_loss(config, classes)
    if isinstance(config.data, DatasetData):
        for name, settings in config.data.parts.items():
            slot = f"data.{name}"
            check_complete(slot, *arguments(slot, settings, Dataset, config.imports))
    list(parameter_groups(config, model, 1.0))
    _check_transforms(config)
    check_columns(build_callbacks(config), measured_columns(["validation"] + ["test"] * config.trainer.test_each_epoch))
    build_loggers(config)
    _check_step(config)


@seeded_generators(torch.device("cpu"))
def check_loss(config: Config, num_classes: int | None) -> None:
    """Compute the loss of a few images; raise UserError if it fails.

    num_classes: None before the images are read; then a failing loss is accepted, because it may need more classes
    """
    weights = config.loss.get("weight")
    if isinstance(weights, list) and num_classes not in (None, len(weights)):
        raise UserError(f"loss.weight={weights}: must have {num_classes} numbers, one for each class")
    classes = num_classes or (len(weights) if isinstance(weights, list) else 2)
    images = 4 if classes == 3 else 3  # not equal to `classes`, so that a loss that confuses images and classes fails
    loss = build_loss(config, [1] * classes)
    logits = torch.zeros(images, classes, requires_grad=True)
    name = f"loss ({type(loss.loss).__name__})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about different shapes, an error below
            value = loss(logits, torch.tensor([0] * (images - 1) + [classes - 1]))
    except Exception as error:  # user code can raise any exception
        if num_classes is None:
            return
        what = f"logits [{images}, {classes}] and labels [{images}]"
        raise UserError(f"{name}: fails on {what}: {one_line(error)}{place_of(error)}") from error
    if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"{name}: must return one number with a gradient, not {shape}")


def _check_batch_norm(model: nn.Module, processes: int, on_gpu: bool) -> None:
    if processes > 1 and not on_gpu and has_batch_norm(model):
        raise UserError(
            "trainer.devices: batch normalisation over several processes needs GPUs; use trainer.devices=1 on a CPU"
        )


def check_initial_weights(config: Config) -> None:
    """Load `trainer.init_from` as a new run will; raise UserError. A branched run has its parent's weights instead."""
    if config.trainer.init_from is not None and config.parent is None:
        initial_model(config, known_classes(config.data))


def _check_transforms(config: Config) -> None:
    """Apply the operations of `augment.transforms` to an image, if the size of the images is known."""
    data, transforms = config.data, build_transforms(config)
    side = data.crop_size or data.store_size
    if side is None:  # images keep their own size, known for some data sets
        side = {"cifar10": 32, "cifar100": 32, "shapes": data.image_size}.get(data.name)
    if transforms and side is not None:
        ramp = torch.linspace(0, 255, side).to(torch.uint8).view(1, 1, side, 1).repeat(1, side, 1, 3)
        apply_transforms(ramp, torch.zeros(1, dtype=torch.int64), transforms, config.seed, 0)
        image = nn.Sequential(*transforms)(ramp[0].permute(2, 0, 1))
        if image.is_floating_point() and not (image.min() >= -0.5 and image.max() <= 1.5):
            log.warning(
                "augment.transforms: return floats from %.2f to %.2f, which are clipped to 0 … 1: remove a Normalize "
                "(data.mean and data.std follow), or divide by 255",
                *(float(value) for value in image.aminmax()),
            )


def _check_step(config: Config) -> None:
    """Step the optimizer once, on a small network with two kinds of layers, and build the schedule."""
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2, 2))
    plain = {k: v for k, v in config.optimizer.items() if k != "param_groups"}

    def construct(cls: Any, keywords: Mapping[str, Any]) -> Any:
        return cls(network.parameters(), **keywords)

    optimizer = instantiate("optimizer", plain, Optimizer, config.imports, construct=construct)
    for number, rule in enumerate(config.optimizer.get("param_groups") or []):  # PyTorch checks no group's settings
        settings = plain | {k: v for k, v in rule.items() if k not in GROUP_KEYS}
        instantiate(f"optimizer.param_groups.{number}", settings, Optimizer, config.imports, construct=construct)
    network(torch.zeros(1, 3, 3, 3)).sum().backward()
    set_optimizer_mode(optimizer, "train")  # some optimizers (schedule-free ones) step in this mode only
    try:
        optimizer.step()
    except Exception as error:  # LBFGS needs a closure, SparseAdam sparse gradients; others raise other errors
        raise UserError(
            f"optimizer._target_={plain['_target_']}: step() without arguments fails ({one_line(error)})"
        ) from error
    try:
        state = optimizer.state_dict()
        pack({key: state[key] for key in ("state", "param_groups")}, "optimizer", {})
    except (LookupError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"optimizer._target_={plain['_target_']}: its state_dict cannot be saved ({one_line(error)})"
        ) from error
    build_scheduler(config.scheduler, optimizer, 100, config.imports)


# -- a training


def build_state(
    config: Config,
    runtime: Runtime,
    num_classes: int,
    steps_per_epoch: int,
    world: World = SINGLE_PROCESS,
    callbacks: Sequence[Callback] = (),
    *,
    resumed: bool = False,
    counts: Sequence[int] | None = None,
    folder: Path | None = None,
) -> TrainingState:
    """Return the state of a training before its first step.

    counts: training images of each class, for loss.weight=balanced
    resumed: do not read the weights of `trainer.init_from`, because a checkpoint will be loaded
    """
    check_loss(config, num_classes)
    model, new_weights = initial_model(config, num_classes, with_weights=not resumed)
    freeze(model, config.trainer.freeze)
    _check_batch_norm(model, world.size, runtime.device.type == "cuda")  # torchrun can have set the size
    model = model.to(runtime.device).to(memory_format=runtime.memory_format)
    if world.size > 1 and has_batch_norm(model):  # use statistics of the whole batch, as one process does
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = build_optimizer(config, model, fused=runtime.device.type in ("cpu", "cuda"))
    first, epochs = schedule_span(config.to_dict())
    length = epochs * steps_per_epoch if steps_by_batch(config.scheduler) else epochs
    scheduler = build_scheduler(config.scheduler, optimizer, length, config.imports)
    schedule = Schedule(config.scheduler, scheduler, optimizer, length, steps_per_epoch, first * steps_per_epoch)
    criterion = build_loss(config, counts or [1] * num_classes).to(runtime.device)
    return TrainingState(
        *(config, runtime, model, criterion, optimizer, schedule, steps_per_epoch, world, list(callbacks), new_weights),
        folder=folder,
    )


def training_batches(config: Config, runtime: Runtime, images: ImageSet, world: World = SINGLE_PROCESS) -> Batches:
    """Return the batches that a run trains on, with its seed, its augmentation, and this process's share of each."""
    return Batches(
        images,
        config.data,
        runtime.device,
        seed=config.seed,
        augment=config.augment,
        transforms=build_transforms(config),
        channels_last=runtime.channels_last,
        share=(world.rank, world.size),
    )


def initial_model(config: Config, num_classes: int | None, with_weights: bool = True) -> tuple[nn.Module, list[str]]:
    """Return the network, with initial weights from the seed or from `trainer.init_from`.

    Also returns the names of weights that `trainer.init_from` did not set. Keeps the global generator's state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.model, num_classes, config.data.image_size, config.imports)
    if config.trainer.init_from is None or not with_weights:
        return model, []
    path = Path(os.path.expanduser(config.trainer.init_from))
    return model, load_initial_weights(model, path / "model.safetensors" if path.is_dir() else path)
