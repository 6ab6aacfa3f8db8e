"""Build the network that a config names, and load its initial weights."""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean, one_line, place_of
from zfnet.config.instantiate import instantiate, resolve
from zfnet.config.reading import MOST_BYTES, parse_json, refuse_pipe
from zfnet.config.schema import ModelConfig
from zfnet.model.layers import replace_dropout
from zfnet.model.zfnet import ZFNet


def build_model(
    model: ModelConfig | Mapping[str, Any],
    num_classes: int | None,
    image_size: int,
    imports: Sequence[str] = (),
    probe: bool = True,
) -> nn.Module:
    """Return the network for images [N, 3, S, S]: ZFNet, or the `nn.Module` that a `_target_` names.

    A class other than ZFNet receives `num_classes` and `image_size` if it accepts them. Its dropout layers are replaced
    by keyed ones with masks that depend on the seed. Raises UserError if it does not map images to logits
    [N, num_classes]; `probe=False` skips this check. `num_classes=None` (no images read yet) allows any number.
    """
    outputs = num_classes or 2
    if isinstance(model, ModelConfig):
        return ZFNet(outputs, image_size, model)
    cls = resolve("model", model.get("_target_"), nn.Module, imports)
    # pass `image_size` only if the signature names it: `**kwargs` could forward it to a class that does not accept it
    sizes = {"image_size": image_size} if "image_size" in inspect.signature(cls).parameters else {}
    defaults = {"num_classes": outputs, **sizes}
    network: nn.Module = instantiate("model", model, nn.Module, imports, defaults=defaults)
    replace_dropout(network)
    if probe:
        check_logits(network, num_classes, image_size)
    return network


def check_logits(network: nn.Module, num_classes: int | None, image_size: int, training: bool = False) -> None:
    """Raise UserError if a network does not map images to logits [N, num_classes]; None allows any number of classes.

    training: run it in training mode, which changes running statistics and can draw random numbers
    """
    name, size, before = type(network).__name__, [2, 3, image_size, image_size], network.training
    mode = " in training mode" if training else ""
    try:
        with torch.set_grad_enabled(training):
            logits = network.train(training)(torch.zeros(size))
    except Exception as error:  # user code can raise any exception
        raise UserError(f"model ({name}): fails{mode} on images {size}: {one_line(error)}{place_of(error)}") from error
    network.train(before)
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or shape != [2, num_classes or logits.shape[1]]:
        wanted = f"[2, {num_classes or 'classes'}]"
        raise UserError(f"model ({name}): returns {shape} for 2 images{mode}; must be {wanted}")
    if training and not logits.requires_grad and any(p.requires_grad for p in network.parameters()):
        raise UserError(f"model ({name}): returns logits without a gradient; remove detach() or no_grad()")
    if other := next((k for k, v in network.state_dict().items() if not isinstance(v, Tensor)), None):
        raise UserError(f"model ({name}): {other} in its state_dict is no tensor; only tensors can be saved")


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a safetensors file; the tensors' data is read from the disk on first use.

    Raises OSError or SafetensorError. Raises ValueError if a name occurs twice (safetensors would keep one of the two)
    or if the header claims to be longer than the file.
    """
    refuse_pipe(path)
    with open(path, "rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > size - 8:
            raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
        parse_json(file.read(min(length, MOST_BYTES)))
    with safe_open(path, "pt") as tensors:
        return tensors.metadata() or {}, {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118


def refuse_not_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise UserError if any weight is NaN or infinite."""
    for name, value in state.items():
        # float8 has no `isfinite`
        if value.is_floating_point() and not (value if value.itemsize > 1 else value.float()).isfinite().all():
            raise UserError(f"{path}: its {name} contains NaN or infinity: training diverged, or the file is damaged")


def load_initial_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a safetensors file into the network; return the names of the weights that keep their initial values.

    Only the last layer may differ, in its number of classes; it then keeps its initial values. Raises UserError for any
    other difference, and for a file that is not safetensors.
    """
    where = f"trainer.init_from={path}"
    try:
        state = {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v for k, v in read_tensors(path)[1].items()}
    except FileNotFoundError:
        raise UserError(f"{where}: there is no such file of weights") from None
    except (OSError, SafetensorError, ValueError) as error:
        if path.suffix in (".pth", ".pt", ".bin"):
            raise UserError(f"{where}: convert the file first, by job=import source={path} model=…") from error
        raise UserError(f"{where}: is not a safetensors file, or is damaged ({error})") from error
    if isinstance(model, ZFNet):
        state = model.translate_names(state)
    own = model.state_dict()
    head = list(own)[-1].rpartition(".")[0] + "."
    fresh = []
    for name, value in own.items():
        if name not in state:
            raise UserError(f"{where}: has no {name}")
        own_shape, shape = list(value.shape), list(state[name].shape)
        if state[name].is_floating_point() != value.is_floating_point():
            raise UserError(f"{where}: its {name} is {state[name].dtype}, this network's is {value.dtype}")
        if shape != own_shape:
            if not name.startswith(head) or shape[1:] != own_shape[1:]:
                raise UserError(f"{where}: its {name} is {shape}, this network's is {own_shape}")
            fresh.append(name)
            state[name] = value
    for name in state:
        if name not in own:
            raise UserError(f"{where}: contains {name}, but the network has no such weight")
    refuse_not_finite(path, state)
    model.load_state_dict(state)
    return fresh


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze the named modules (`TrainingState.train` freezes their running statistics); raise UserError."""
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not any(True for _ in modules[name].parameters()):
            known = [n for n, m in modules.items() if n and any(True for _ in m.parameters())]
            raise UserError(f"trainer.freeze: the network has no layer {name}{did_you_mean(name, known)}")
        modules[name].requires_grad_(False)


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether any layer normalises over the batch."""
    # the base class of BatchNorm1d to 3d and of SyncBatchNorm, which replaces them in training on several GPUs
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
