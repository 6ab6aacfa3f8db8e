"""job=filters: first-layer filters of one run or two, drawn and measured (paper, Fig. 6)."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from zfnet.config.ranges import limits
from zfnet.config.schema import Config
from zfnet.explain.filters import FLAT, Filters, in_pixel_units, measure_filters
from zfnet.explain.selection import Look, part_to_show
from zfnet.plots.figures import save_figure
from zfnet.plots.filters import draw_filters
from zfnet.runs.directory import find_run
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class FiltersJob(Look):
    """`other` is a second run's directory; `limit` the RMS that the paper allows a filter."""

    other: Optional[str]
    limit: float = limits(above=0)

    def main(self, config: Config, output: Path) -> None:
        """Write figures/filters.png, filters.csv (every filter) and filters.json (each run as a whole)."""
        runs = [LoadedRun(config)]
        if config.job.other is not None:
            other = find_run(config.job.other)
            recorded = other.read_config()  # its own data, which may be another, but this command's device
            runs.append(
                LoadedRun(
                    dataclasses.replace(
                        recorded, job=config.job, trainer=config.trainer, run=str(other.folder), images=None
                    )
                )
            )
        parts = [part_to_show(used).images for used in runs]
        with own_directory(config, output) as run:
            found = {
                f"{'AB'[k]}: {used.source.folder.name}": measure_filters(
                    used.model, used.batches(part).in_order()
                )
                for k, (used, part) in enumerate(zip(runs, parts, strict=True))
            }
            metadata = {
                name: {
                    "run": str(used.source.folder),
                    "model": used.metadata.model.name,
                    "images": len(part),
                    **_facts(filters, used, config.job.limit),
                }
                for (name, filters), used, part in zip(found.items(), runs, parts, strict=True)
            }
            save_figure(draw_filters(found, config.job.limit), run.figures / "filters.png")
            run.write_csv("filters.csv", _rows(found))
            run.write_json("filters.json", {"limit": config.job.limit, "flat_below": FLAT, "runs": metadata})
            for name, row in metadata.items():
                size = row["kernel_size"]
                log.info("%s: %d filters %d×%d, stride %d", name, row["filters"], size, size, row["stride"])
                log.info(
                    "  RMS: median %.3g, largest %.3g, %d beyond %g (for inputs of 0 … 255: %d)",
                    row["rms"]["median"],
                    row["rms"]["max"],
                    row["beyond_limit"],
                    config.job.limit,
                    row["beyond_limit_for_inputs_of_0_to_255"],
                )
                log.info("  %d dead on %d images, %d flat", row["dead"], row["images"], row["flat"])
                log.info("  energy that aliases: %.1f %% (median)", 100 * row["aliasing_energy"]["median"])
            log.info("written to %s", run.folder)


def _facts(filters: Filters, used: LoadedRun, limit: float) -> dict[str, Any]:
    pixels = in_pixel_units(filters.rms, used.data.std)
    return {
        "filters": len(filters.rms),
        "kernel_size": filters.weight.shape[-1],
        "stride": filters.stride,
        "rms": _summary(filters.rms),
        "rms_for_inputs_of_0_to_255": _summary(pixels),
        "beyond_limit": int((filters.rms > limit).sum()),
        "beyond_limit_for_inputs_of_0_to_255": int((pixels > limit).sum()),
        "dead": int(filters.silent.sum()),
        "flat": int(filters.flat.sum()),
        "aliasing_energy": _summary(filters.aliasing),
        "mean_power_density_up_to": dict(
            zip(
                (f"{f:.3f}" for f in filters.frequencies.tolist()),
                filters.spectrum.mean(0).tolist(),
                strict=True,
            )
        ),
    }


def _summary(values: torch.Tensor) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "median": float(values.median()),
        "mean": float(values.mean()),
        "max": float(values.max()),
    }


def _rows(found: dict[str, Filters]) -> list[dict[str, Any]]:
    return [
        {
            "run": name,
            "filter": n,
            "rms": float(filters.rms[n]),
            "dead": bool(filters.silent[n]),
            "flat": bool(filters.flat[n]),
            "largest_activation": float(filters.peak[n]),
            "aliasing_energy": float(filters.aliasing[n]),
            **{
                f"density_to_{end:.3f}": share
                for end, share in zip(filters.frequencies.tolist(), filters.spectrum[n].tolist(), strict=True)
            },
        }
        for name, filters in found.items()
        for n in range(len(filters.rms))
    ]
