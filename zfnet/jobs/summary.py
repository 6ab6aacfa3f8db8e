"""job=summary: print a table of the network's layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torchinfo

from zfnet.config.schema import Config, Job, ModelConfig, model_name
from zfnet.data import known_classes, load_splits
from zfnet.model.build import freeze
from zfnet.runs.directory import find_run
from zfnet.runs.tables import format_table
from zfnet.runs.weights import load_model
from zfnet.training.build import initial_model

BATCH = 2  # images, as in the blog's table


@dataclass(kw_only=True)
class SummaryJob(Job):
    reads_run: ClassVar[str] = "optional"

    def main(self, config: Config, output: Path) -> None:
        """Print each layer's output shape for BATCH images, its parameters and multiply-adds per image, and totals."""
        size, classes = config.data.image_size, known_classes(config.data)
        if classes is None and config.run and (weights := find_run(str(config.run)).weights).is_file():
            classes = len(load_model(weights, config.imports)[1].classes)
        elif classes is None:
            classes = len(load_splits(config.data, config.imports).train.classes)
        # counting needs no values, and on `meta` weights use no memory; the code of other networks can need values
        device = "meta" if isinstance(config.model, ModelConfig) else "cpu"
        with torch.device(device):
            model = initial_model(config, classes, with_weights=False)[0].eval()
        freeze(model, config.trainer.freeze)
        network = torchinfo.summary(
            model,
            (BATCH, 3, size, size),
            verbose=0,
            device=device,
            depth=1,
            col_names=("output_size", "num_params", "mult_adds"),  # torchinfo counts only these
        )
        whose = f"run={config.run}: " if config.run else ""
        print(f"{whose}model={model_name(config.model)} for {classes} classes ({config.data.title}), {size} px")
        print("multiply-adds are for one image\n")
        rows: list[tuple[str, ...]] = [("layer", "type", "output shape", "parameters", "multiply-adds")]
        names = {id(module): name for name, module in model.named_modules()}
        for layer in network.summary_list:
            if layer.is_leaf_layer:
                shape = " × ".join(str(n) for n in layer.output_size)
                counts = (f"{n:,}" if n else "" for n in (layer.num_params, layer.macs // BATCH))
                rows.append((names[layer.layer_id], layer.class_name, shape, *counts))
        rows.append(("total", "", "", f"{network.total_params:,}", f"{network.total_mult_adds // BATCH:,}"))
        print("\n".join(format_table(rows, "<<<>>", 80, shrink=(0, 1))))
        if any(each.class_name == "Linear" and len(each.output_size) > 2 for each in network.summary_list):
            print("\ntoo few multiply-adds: a Linear of tokens counts as one of a single token,")
            print("and attention does not count")
        print(
            f"\n{network.trainable_params:,} of {network.total_params:,} parameters are trainable; weights "
            f"{network.total_param_bytes / 1e6:.1f} MB,\nactivations of a forward and backward pass of {BATCH} images "
            f"{network.total_output_bytes / 1e6:.1f} MB"
        )
