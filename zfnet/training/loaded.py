"""Load a finished run for other jobs: its network on the chosen device, and images prepared as in its training."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from zfnet.config.errors import UserError, did_you_mean, log
from zfnet.config.schema import Config, DataConfig, model_name
from zfnet.data import Batches, ImageSet, Splits, load_splits
from zfnet.data.images import class_name
from zfnet.model.chain import Chain, Network
from zfnet.runs.directory import find_run
from zfnet.runs.weights import ModelMetadata, load_model
from zfnet.training.device import resolve_runtime

# these keys determine the network's input, so they come from the run, whatever data is used
PREPROCESSING = ("image_size", "mean", "std", "crop_size", "store_size", "fit", "draft")
_FIXED_GROUPS = ("model", "loss", "optimizer", "scheduler", "augment", "callbacks")


class LoadedRun:
    """The run that `run=<dir>` names: its network on the chosen device, and images prepared as in its training.

    source: the run directory; it is not changed
    model: in evaluation mode, on runtime.device
    metadata: classes and preprocessing, as recorded with the weights
    data: where images come from, after overrides, with the run's preprocessing

    Raises UserError if the run is not finished, or an override contradicts its network.
    """

    def __init__(self, config: Config) -> None:
        for key, override in config.overridden.items():
            if key.split(".")[0] in _FIXED_GROUPS:
                raise UserError(
                    f"{override}: job={config.job.name} uses the network and the weights of run={config.run} "
                    "as they are; leave it out"
                )
        self.config = config
        self.source = find_run(str(config.run))
        model, self.metadata = load_model(self.source.weights, config.imports)
        self.data = _data_for(config.data, self.metadata, config.overridden)
        self.runtime = resolve_runtime(config.trainer, own_network=isinstance(self.metadata.model, dict))
        self.model = model.to(self.runtime.device).to(memory_format=self.runtime.memory_format)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.metadata.classes

    @functools.cached_property
    def network(self) -> Network:
        """The layers of the network, for jobs that only read their outputs."""
        return Network.of(self.model, self.data.image_size)

    @property
    def chain(self) -> Chain:
        """The network as a list of steps, as the deconvnet needs it; raise UserError if it is not a chain."""
        if isinstance(self.network, Chain):
            return self.network
        name = model_name(self.metadata.model)
        raise UserError(f"job={self.config.job.name}: {name} is not a chain of layers: {self.network.problem}")

    @functools.cached_property
    def splits(self) -> Splits:
        """The images, loaded on first access; labels are the run's class numbers, matched by class name."""
        loaded = load_splits(self.data, self.config.imports)
        before = self.metadata.data
        stored = (self.data.name, self.data.fit, loaded.train.images.shape[1])
        if stored == (before.name, before.fit, self.metadata.stored_size):
            if changed := loaded.difference(self.source.environment, sizes=self.data.eval_subset is None):
                log.warning("the images are not those of run=%s: %s", self.source.folder, changed)
            elif self.data.split_seed != before.split_seed:
                own = load_splits(replace(self.data, split_seed=before.split_seed), self.config.imports)
                if not torch.equal(own.train.rows, loaded.train.rows):
                    text = "run=%s split these images with data.split_seed=%d: it trained on some that are now held out"
                    log.warning(text, self.source.folder, before.split_seed)
        validation, test = (None if s is None else self._with_run_labels(s) for s in (loaded.validation, loaded.test))
        return replace(loaded, train=self._with_run_labels(loaded.train), validation=validation, test=test)

    def split(self, name: str) -> ImageSet:
        """Return train, validation, test, or `all` of them; raise UserError if there is no such split."""
        if name == "all":
            every = (self.splits.train, self.splits.validation, self.splits.test)
            return _joined([images for images in every if images is not None])
        images: ImageSet | None = getattr(self.splits, name)
        if images is None:
            raise UserError(f"job.split={name}: data={self.data.name} has no {name} images")
        return images

    def batches(self, images: ImageSet, data: DataConfig | None = None) -> Batches:
        """Return the batches of `images` on the device, prepared as `data` says (default: as in training)."""
        return Batches(images, data or self.data, self.runtime.device, channels_last=self.runtime.channels_last)

    def _with_run_labels(self, images: ImageSet) -> ImageSet:
        if images.classes == self.classes:
            return images
        known = {class_name(name): number for number, name in enumerate(self.classes)}  # old records have any form
        plain = {_plain(name): number for name, number in known.items()}  # a folder can be named English_springer
        numbers = [known.get(name, plain.get(_plain(name))) for name in images.classes]
        for name, number in zip(images.classes, numbers, strict=True):
            if number is None:
                problem = f"its class '{name}' is not one of run={self.source.folder}"
                raise UserError(f"data={self.data.name}: {problem}{did_you_mean(name, known)}")
        return replace(images, labels=torch.tensor(numbers)[images.labels], classes=self.classes)


def _plain(name: str) -> str:
    """Return a class's name in lower case, with spaces."""
    return name.replace("_", " ").casefold()


def _data_for(data: DataConfig, metadata: ModelMetadata, given: Collection[str]) -> DataConfig:
    """Return `data` with the run's preprocessing, except for keys that the command line sets."""
    if "data" in given:  # the command line replaced the whole group
        kept = {key: getattr(metadata.data, key) for key in PREPROCESSING if f"data.{key}" not in given}
        data = replace(data, **kept)
    if data.image_size != metadata.data.image_size:
        raise UserError(
            f"data.image_size={data.image_size}: the run's network expects images of {metadata.data.image_size} px; "
            "leave it out"
        )
    elsewhere = (data.name, data.root) != (metadata.data.name, metadata.data.root)
    if elsewhere and "data.store_size" not in given:
        data = replace(data, store_size=metadata.stored_size)
    return data


def _joined(sets: Sequence[ImageSet]) -> ImageSet:
    """Concatenate splits of one data set. If all share one array of pixels, it is not copied."""
    arrays = list({id(s.images): s.images for s in sets}.values())
    starts = dict(zip(map(id, arrays), np.cumsum([0, *map(len, arrays)]).tolist(), strict=False))
    boxes = [s.boxes for s in sets if s.boxes is not None]
    return replace(
        sets[0],
        images=arrays[0] if len(arrays) == 1 else np.concatenate(arrays),
        labels=torch.cat([s.labels for s in sets]),
        rows=torch.cat([s.rows + starts[id(s.images)] for s in sets]),
        boxes=torch.cat(boxes) if len(boxes) == len(sets) else None,
        files=sets[0].files if len(arrays) == 1 else (),
    )
