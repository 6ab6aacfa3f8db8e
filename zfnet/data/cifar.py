"""CIFAR-10 and CIFAR-100 through torchvision."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from zfnet.config.errors import UserError
from zfnet.data.images import ImageSet, fingerprint, image_set

NETWORK_TIMEOUT_S = 30


def load_cifar(name: str, root: str) -> tuple[ImageSet, ImageSet, str]:
    """Return (training set, test set, fingerprint) of `cifar10` or `cifar100`, downloading it if it is not at `root`.

    torchvision compares the MD5 of every file with the published one before it reads it, on each load. That
    matters beyond transmission errors: the files are pickles, and only the published ones are ever opened.
    """
    import torchvision  # half a second, which other images need not wait for

    folder = Path(root).expanduser()
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        train = cls(str(folder), train=True)
    except RuntimeError:  # absent or damaged
        train = _download(cls, name, folder)
    test = cls(str(folder), train=False)
    sets = [image_set(part.data, torch.tensor(part.targets), part.classes) for part in (train, test)]
    marks = [part.data for part in (train, test)] + [s.labels.numpy() for s in sets]
    return sets[0], sets[1], fingerprint(*marks)


def _download(cls: type, name: str, folder: Path):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)  # torchvision sets none, and would wait for ever
    try:
        return cls(str(folder), train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {folder.absolute()} and could not be downloaded ({_reason(error)}): set data.root=… to "
            "a folder that holds it, or try the built-in images with experiment=quickstart"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error).strip().splitlines()[0]
