"""A config folder from elsewhere cannot run code or write elsewhere, whatever Hydra settings it contains."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf

from tests.conftest import skip_mode_lookup
from tests.helpers import TINY_EXACT, Trap, compose
from zfnet.config import trust
from zfnet.config.errors import UserError
from zfnet.config.trust import CONF, only_own_folders
from zfnet.runs.directory import RunDirectory

TOUCH = "{_target_: pathlib.Path.touch, self: witness}"
CALLBACK = f"hydra:\n  callbacks:\n    x: {TOUCH}\n"
GLOBAL = "# @package _global_\n"

# The files of each folder. A folder with a config.yaml is the primary config (`--config-path`). The others are added
# (`--config-dir`), and experiment=x or optimizer=x chooses their file.
RUNS_CODE = {
    "callback": {"config.yaml": CALLBACK},
    "callback in an experiment": {"experiment/x.yaml": GLOBAL + CALLBACK},
    "an invalid date": {"config.yaml": "day: 2026-99-99\n" + CALLBACK},
    "a Python tag": {"config.yaml": "p: !!python/object/apply:pathlib.Path [x]\n" + CALLBACK},
    "escapes": {"config.yaml": f'"\\x68ydr\\u0061": {{"callb\\x61cks": {{"x": {TOUCH}}}}}\n'},
    "an alias": {"config.yaml": f"a: &a {{callbacks: {{x: {TOUCH}}}}}\nhydra: *a\n"},
    "a merge": {"config.yaml": f"a: &a {{callbacks: {{x: {TOUCH}}}}}\nhydra: {{<<: *a}}\n"},
    "package in a header": {"experiment/x.yaml": f"# @package hydra.callbacks\nx: {TOUCH}\n"},
    "package in a default": {
        "experiment/x.yaml": GLOBAL + "defaults: [/other@hydra.callbacks: bad]\n",
        "other/bad.yaml": f"x: {TOUCH}\n",
    },
    "a Hydra group": {
        "experiment/x.yaml": GLOBAL + "defaults: [override /hydra/callbacks: bad]\n",
        "hydra/callbacks/bad.yaml": f"x: {TOUCH}\n",
    },
    "a default outside the folder": {
        "experiment/x.yaml": GLOBAL + "defaults: [../../elsewhere/bad@_global_]\n",
        "../elsewhere/bad.yaml": CALLBACK,
    },
    "interpolation of a part": {"config.yaml": f"evil: {{x: {TOUCH}}}\nhydra: {{callbacks: '${{evil}}'}}\n"},
    "interpolation of an entry": {"config.yaml": f"evil: {TOUCH}\nhydra: {{callbacks: {{x: '${{evil}}'}}}}\n"},
    "interpolation of a target": {
        "config.yaml": "t: pathlib.Path.touch\nhydra: {callbacks: {x: {_target_: '${t}', self: witness}}}\n"
    },
    "a resolver": {"config.yaml": f"hydra: {{callbacks: {{x: \"${{oc.create:'{TOUCH}'}}\"}}}}\n"},
    "a Hydra function": {
        "config.yaml": "hydra: {callbacks: {x: {_target_: hydra.utils.get_object, path: witness_module.x}}}\n"
    },
    "nested in a Hydra callback": {
        "config.yaml": "hydra: {callbacks: {x: {_target_: hydra.experimental.callbacks.LogJobReturnCallback, "
        f"y: {TOUCH}}}}}}}\n"
    },
    "nested in our callback": {
        "config.yaml": f"hydra: {{callbacks: {{x: {{_target_: zfnet.sweeps.callback.SweepReport, y: {TOUCH}}}}}}}\n"
    },
    "a log handler factory": {
        "config.yaml": "hydra: {job_logging: {version: 1, handlers: {x: {'()': pathlib.Path.touch, self: witness}}}}\n"
    },
    "a log handler class": {
        "config.yaml": "hydra: {hydra_logging: {version: 1, handlers: {x: {class: witness_module.Handler}}}}\n"
    },
    "a harmless key with the same dotted name": {
        "config.yaml": "hydra: {job_logging: {version: 1, handlers: {x: {'()': pathlib.Path.touch, self: witness}}, "
        "handlers.x.(): null, handlers.x.self: null}}\n"
    },
    "a package in the search path": {"config.yaml": "hydra: {searchpath: ['pkg://witness_module']}\n"},
    "a folder in the search path": {
        "config.yaml": "hydra: {searchpath: ['file://../elsewhere']}\ndefaults: [x@_global_: x]\n",
        "../elsewhere/x/x.yaml": CALLBACK,
    },
    "recorded overrides": {
        "optimizer/x.yaml": GLOBAL + "optimizer: {_target_: witness_module.X}\n"
        "hydra: {overrides: {task: ['imports=[witness_module]']}}\n"
    },
}
SWEPT = {
    "launcher": {
        "experiment/x.yaml": GLOBAL + "defaults: [override /hydra/launcher: bad]\n",
        "hydra/launcher/bad.yaml": f"{TOUCH}\n",
    },
    "sweeper": {"config.yaml": "defaults: [override hydra/sweeper: bad]\n", "hydra/sweeper/bad.yaml": f"{TOUCH}\n"},
    "a launcher's commands": {
        "experiment/x.yaml": GLOBAL + "defaults: [override /hydra/launcher: submitit_slurm]\n"
        "hydra: {launcher: {setup: ['touch witness']}}\n"
    },
    "a search's storage": {
        "experiment/x.yaml": GLOBAL + "defaults: [override /hydra/sweeper: optuna]\n"
        "hydra: {sweeper: {storage: 'sqlite:////tmp/outside'}}\n"
    },
    "a default that only some jobs choose": {
        "experiment/y.yaml": GLOBAL,
        "experiment/x.yaml": GLOBAL + "hydra: {job_logging: {version: 1, handlers: {x: {'()': pathlib.Path.touch, "
        "self: witness}}}}\n",
    },
    "sweeper parameters": {
        "experiment/x.yaml": GLOBAL + "optimizer: {_target_: witness_module.X}\n"
        "hydra: {sweeper: {params: {++imports: '[witness_module]'}}}\n"
    },
}
SETS = {
    "run.dir": ["../outside", "/tmp/outside", "${oc.env:OUTSIDE}", "a/../../b", "${outside}"],
    "sweep.dir": ["../outside"],
    "sweep.subdir": ["../outside", "${hydra.job.override_dirname}", "${outside}"],
    "output_subdir": ["../../outside"],
    "job.name": ["../outside"],
    "job.env_set.LD_PRELOAD": ["outside.so"],
    "job.env_set.ZFNET_TRIAL": [3],
    "job_logging.handlers.file.filename": ["/tmp/outside"],
}


def folder_of(tmp_path: Path, files: dict[str, str]) -> Path:
    folder = tmp_path / "their"
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def run_hostile(run_py, tmp_path: Path, monkeypatch):
    """Return a function that runs a command with a hostile folder and asserts that none of its code ran."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "witness_module.py").write_text("open('witness', 'w').close()\nclass X: pass\n")
    monkeypatch.setenv("OUTSIDE", str(tmp_path.parent))
    before = set(tmp_path.parent.iterdir())
    monkeypatch.setattr(Hydra, "get_mode", skip_mode_lookup)  # would compose and check a second time

    def run(files: dict[str, str], *words: str, option: str | None = None) -> str:
        folder = folder_of(tmp_path, files)
        primary = "config.yaml" in files
        option = option or ("--config-path" if primary else "--config-dir")
        chosen = {Path(name).parts[0] for name in files} & {"experiment", "optimizer"}
        choice = [f"{group}=x" for group in chosen if not any(w.startswith(f"{group}=") for w in words)]
        answer = run_py(*words, *choice, *([] if primary else ["job=summary"]), option, folder)
        assert not (tmp_path / "witness").exists()
        assert set(tmp_path.parent.iterdir()) == before
        assert "witness_module" not in sys.modules
        assert answer.error.removeprefix("no job has started: ").startswith(("hydra.", "job.")), answer.error
        return answer.error

    return run


@pytest.mark.parametrize("kind", RUNS_CODE)
def test_a_hostile_folder_runs_nothing(run_hostile, kind: str) -> None:
    run_hostile(RUNS_CODE[kind])


@pytest.mark.parametrize("kind", SWEPT)
def test_a_hostile_folder_runs_nothing_in_a_sweep(run_hostile, kind: str) -> None:
    files = SWEPT[kind]
    run_hostile(files, "-m", *(["experiment=y,x"] if "experiment/y.yaml" in files else []))


@pytest.mark.parametrize("words", [["-m", "--cfg", "job"], ["--config-dir", "nowhere"], ["model=nope"]])
def test_an_error_is_explained_without_running_anything(run_py, tmp_path: Path, monkeypatch, words: list[str]) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "witness_module.py").write_text("open('witness', 'w').close()\n")
    folder = folder_of(tmp_path, RUNS_CODE["a package in the search path"])
    assert run_py("--config-path", folder, *words).code == 1
    assert not (tmp_path / "witness").exists()
    assert "witness_module" not in sys.modules


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SETS.items() for value in values])
def test_only_the_command_line_sets(run_hostile, key: str, value: object) -> None:
    text = f"{value!r}"
    for name in reversed(key.split(".")):
        text = f"{{{name}: {text}}}"
    error = run_hostile({"config.yaml": f"outside: ../outside\nhydra: {text}\n"})
    assert error.startswith(f"hydra.{key}=")
    assert ": an external config folder may not set this" in error


@pytest.mark.parametrize("option", ["--config-di", "--config-d", "-cd"])
def test_abbreviated_options_name_folders_too(run_hostile, option: str) -> None:
    run_hostile(RUNS_CODE["callback in an experiment"], option=option)


def test_linked_and_searched_folders_are_checked(run_hostile, run_py, tmp_path: Path) -> None:
    run_hostile(RUNS_CODE["callback in an experiment"])
    (tmp_path / "link").mkdir()
    (tmp_path / "link/experiment").symlink_to(tmp_path / "their/experiment")
    (tmp_path / "link/loop").symlink_to(tmp_path / "link")
    for words in (["--config-dir", tmp_path / "link"], [f"hydra.searchpath=[file://{tmp_path}/their]"]):
        answer = run_py(*words, "experiment=x", "job=summary")
        assert answer.err.startswith("error: hydra.callbacks.x._target_=pathlib.Path.touch")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("option", ["--experimental-rerun", "--exp", "--e"])
def test_a_pickle_is_not_read(run_py, tmp_path: Path, option: str) -> None:
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Trap()))
    for words in ([option, "config.pickle"], [f"{option}=config.pickle"]):
        answer = run_py(*words)
        assert answer.code == 1
        assert "--experimental-rerun reads a pickle" in answer.err
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("place", ["config.yaml", "experiment/x.yaml"])
def test_aliases_of_a_folder_from_elsewhere_are_bounded(run_py, tmp_path: Path, place: str) -> None:
    lines = [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    folder = folder_of(tmp_path, {place: GLOBAL + "\n".join(["a0: &a0 [1]", *lines])})
    words = ["--config-path", folder] if place == "config.yaml" else ["--config-dir", folder, "experiment=x"]
    answer = run_py(*words)
    assert answer.error == f"{folder / place} cannot be read: it contains more than 100,000 values"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: " + b"[" * 5000, "exceeded maximum nesting depth"),
        (b"- " * 50_000, "exceeded maximum nesting depth"),
        (b"a: \0", "control characters are not allowed"),
        (b"\xff\xfe\xff", ""),
        (b"a: 1\na: 2\n", "it contains 'a' twice"),
    ],
)
def test_a_file_of_a_folder_from_elsewhere_that_is_no_config_is_named(
    run_py, tmp_path: Path, content, expected
) -> None:
    folder = folder_of(tmp_path, {"experiment/x.yaml": ""})
    (folder / "experiment/x.yaml").write_bytes(content)
    answer = run_py("--config-dir", folder, "experiment=x")
    assert answer.error.startswith(f"{folder}/experiment/x.yaml")
    assert expected in answer.error


def test_what_a_folder_from_elsewhere_may_say(run_py, tmp_path: Path) -> None:
    """It can set directories below the current one, Hydra's own choices, numbers, and sweep parameters."""
    files = {
        "experiment/x.yaml": GLOBAL + "hydra:\n  run: {dir: 'mine/${now:%Y}/${job.name}'}\n  verbose: false\n"
        "  job: {chdir: false}\n  sweep: {dir: mine/all, subdir: '${hydra.job.num}'}\n"
        "  sweeper: {max_batch_size: 2, params: {seed: '0,1'}}\n"
    }
    folder = folder_of(tmp_path, files)
    words = ["--config-dir", folder, "experiment=x", "job=summary"]
    assert run_py(*words, "+hydra.job.env_set.ZFNET_X=typed", "hydra/job_logging=disabled", "--cfg", "job").code == 0
    (tmp_path / "their/config.yaml").write_text("defaults: [override hydra/hydra_logging: disabled, _self_]\na: 1\n")
    assert run_py("--config-path", folder, "--cfg", "job").out == "a: 1\n"


def test_a_callback_of_a_trusted_package_is_accepted(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "callback_lab.py").write_text(
        "from pathlib import Path\nfrom hydra.experimental.callback import Callback\n"
        "class Mine(Callback):\n    def __init__(self, path): Path(path).touch()\n"
        "def other(path): Path(path).touch()\n"
    )
    text = "hydra: {callbacks: {x: {_target_: callback_lab.Mine, path: made}}}\n"
    folder = folder_of(tmp_path, {"experiment/x.yaml": GLOBAL + text})
    words = ["--config-dir", folder, "experiment=x", "job=summary"]
    assert "add imports=[callback_lab]" in run_py(*words).err
    assert not (tmp_path / "made").exists()
    run_py(*words, "imports=[callback_lab]")
    assert (tmp_path / "made").exists()
    (folder / "experiment/x.yaml").write_text(GLOBAL + text.replace("Mine", "other").replace("made", "witness"))
    assert (
        "must name a subclass of hydra.experimental.callback.Callback" in run_py(*words, "imports=[callback_lab]").err
    )
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("primary", [True, False])
def test_imports_of_a_folder_from_elsewhere_have_no_effect(run_py, tmp_path: Path, primary: bool) -> None:
    """The folder's config, or a choice that the folder adds to a group, sets `imports`."""
    (tmp_path / "my_lab.py").write_text(
        "open('witness', 'w').close()\nimport torch\nclass Mine(torch.optim.SGD): pass\n"
    )
    mine = {"imports": ["my_lab"], "optimizer": {"_target_": "my_lab.Mine", "lr": 0.1}}
    if primary:
        job = {"job": {"_target_": "zfnet.jobs.train.TrainJob", "name": "train"}}
        folder = folder_of(tmp_path, {"config.yaml": yaml.safe_dump(compose(*TINY_EXACT).to_dict() | job | mine)})
        words = ["--config-path", folder]
    else:
        folder = folder_of(tmp_path, {"optimizer/mine.yaml": GLOBAL + yaml.safe_dump(mine)})
        words = ["--config-dir", folder, *TINY_EXACT, "optimizer=mine"]
    answer = run_py(*words)
    assert answer.code == 1
    assert "add imports=[my_lab]" in answer.err
    assert not (tmp_path / "witness").exists()


def test_imports_of_the_command_line_count_with_a_folder_from_elsewhere(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trusted_lab.py").write_text("import torch\nclass Mine(torch.optim.SGD): pass\n")
    (tmp_path / "ours/optimizer").mkdir(parents=True)
    (tmp_path / "ours/optimizer/mine.yaml").write_text("_target_: trusted_lab.Mine\nlr: 0.1\n")
    words = (*TINY_EXACT, "data.subset=18", "optimizer=mine", "imports=[trusted_lab]", "hydra.run.dir=run")
    answer = run_py("--config-dir", "ours", *words)
    assert answer.code == 0, answer.err
    assert RunDirectory(tmp_path / "run").recorded_config()["imports"] == ["trusted_lab"]
    refused = run_py("job=reproduce", "run=run", "hydra.run.dir=again")
    assert "add imports=[trusted_lab]" in refused.err
    assert run_py("job=reproduce", "run=run", "imports=[trusted_lab]", "hydra.run.dir=again").code == 0


def test_only_own_folders() -> None:
    def source(schema: str, path: str) -> SimpleNamespace:
        return SimpleNamespace(schema=schema, path=path)

    own = [source("pkg", "hydra.conf"), source("file", str(CONF)), source("structured", "")]
    assert only_own_folders(own)
    for other in (("file", "/elsewhere"), ("pkg", "theirs"), ("pkg", "hydra"), ("https", "theirs")):
        assert not only_own_folders([*own, source(*other)])


@pytest.mark.parametrize("value", ["os", "[a.b]", "[1]", "['x y']"])
def test_imports_are_names_of_packages(value: str) -> None:
    with pytest.raises(UserError, match=r"^imports="):
        compose(f"imports={value}")


def test_a_logger_of_a_folder_from_elsewhere_sends_nothing(run_py, tmp_path: Path) -> None:
    text = "logger: {x: {_target_: zfnet.training.loggers.MLflowLogger, tracking_uri: 'http://elsewhere'}}\n"
    folder = folder_of(tmp_path, {"experiment/x.yaml": GLOBAL + text})
    answer = run_py("--config-dir", folder, "experiment=x")
    assert answer.code == 1
    assert "logger.x.tracking_uri=http://elsewhere sends results elsewhere" in answer.err


@pytest.mark.parametrize(
    "root",
    [
        "${oc.env:HOME}",
        "http://x/${oc.env:HOME}",
        "${seed}${seed}",
        "${a:${seed}}",
        "${data}",
        "${data.mean}",
        "${job.x}",
    ],
)
def test_a_folder_reads_no_environment_and_builds_no_text(run_py, tmp_path: Path, root: str) -> None:
    folder = folder_of(tmp_path, {"experiment/x.yaml": f"{GLOBAL}data: {{root: '{root}'}}\n"})
    answer = run_py("--config-dir", folder, "experiment=x", "job=summary")
    assert answer.code == 1
    assert answer.err.startswith(f"error: data.root={root}: an external config folder may not set this")


@pytest.mark.parametrize("folder", ["../outside", "/tmp/outside", "${oc.env:OUTSIDE}/outside"])
def test_a_folder_does_not_choose_where_schemas_are_written(run_hostile, folder: str) -> None:
    job = f"job: {{name: schema, _target_: zfnet.jobs.schema.SchemaJob, folder: '{folder}'}}\n"
    assert run_hostile({"config.yaml": job}).startswith("job.folder=")
    job = f"job: {{name: compare, _target_: zfnet.jobs.compare.CompareJob, split: auto, sweep: '{folder}'}}\n"
    assert run_hostile({"config.yaml": job}).startswith("job.sweep=")


def test_own_files_are_parsed_once_until_they_change(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trust, "_is_own", lambda *_: True)
    source = trust.FileConfigSource("main", f"file://{tmp_path}")
    file = tmp_path / "a.yaml"
    file.write_text("x: 1")
    source.load_config("a").config.x = 3
    with monkeypatch.context() as patch:
        patch.setattr(OmegaConf, "load", lambda _: pytest.fail("the config was parsed again"))
        assert source.load_config("a").config == {"x": 1}
    file.write_text("x: 25")
    assert source.load_config("a").config == {"x": 25}
    file.unlink()
    with pytest.raises(OSError, match="Config not found"):
        source.load_config("a")
