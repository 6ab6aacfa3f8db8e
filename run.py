"""The only entry point. Hydra composes a config, `zfnet/config` checks it, and the config's job runs.

python run.py                                  train on CIFAR-10
python run.py experiment=quickstart            train on built-in images, about a minute, no download
python run.py optimizer=sgd optimizer.lr=0.01  choose a group, set a key
python run.py -m seed=0,1,2                    sweep
python run.py job=summary                      another job (conf/job)
python run.py --help                           every group, and the composed config
"""

import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from zfnet.runs.command import prepare_overrides, read_command
from zfnet.runs.console import errors_pass_hydra, run_with_clear_errors
from zfnet.runs.directory import remove_if_empty
from zfnet.runs.hydra_record import register_resolvers
from zfnet.training.build import check_recipe


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(raw: DictConfig) -> float | None:
    hydra_config = HydraConfig.get()
    # keep `${…}` unresolved: `read_command` resolves it within the composed config and reports its errors
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    folder, here = Path(hydra_config.runtime.output_dir), Path.cwd()
    output = folder.relative_to(here) if here in folder.parents else folder  # with hydra.job.chdir=true, they are equal
    with errors_pass_hydra():
        try:
            config = read_command(raw, overrides, hydra_config.runtime.config_sources)
            if config.job.trains:
                check_recipe(config)
            return config.job.main(config, output)
        except Exception:
            remove_if_empty(output)
            raise


if __name__ == "__main__":
    register_resolvers()
    # Hydra parses sys.argv itself, without a hook that could first add the quotes or `++` that some overrides need
    sys.argv[1:] = prepare_overrides(sys.argv[1:])
    run_with_clear_errors(main)
