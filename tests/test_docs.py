"""README, CONTRIBUTING and docs/: every command composes, every Python block runs, every link target exists.

README's jobs, single-process trainings and sweeps also run, at a tiny size and on built-in images instead of
downloads. A command of another page also runs if no earlier command of its job has its choices (`group=choice`, or a
layer or an epoch of the run). The others are only checked, because the tests of each job run its options. Other sweeps,
multi-process trainings and compiled ones are only composed.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

import zfnet
from tests.conftest import ROOT, Answer
from tests.helpers import TINY_EXACT, no_figures, read_csv, tiny_model_config, write_images
from zfnet.config.schema import Config
from zfnet.jobs.train import compose
from zfnet.runs.command import compose_raw, prepare_overrides, read_command
from zfnet.runs.weights import save_model
from zfnet.training.build import check_recipe

SHELL = (". .venv/bin/activate", "ruff check .", "ruff format --check .", "mypy")  # in CONTRIBUTING
README = ROOT / "README.md"
PAGES = [README, ROOT / "README.zh-CN.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TESTED_ELSEWHERE = "extend.md"  # the tests of examples/extend run its commands
SET_UP = [
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python run.py experiment=quickstart",
    ".venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest",
]

# TINY_EXACT with all layers of the network, because the pages name them, each a few maps wide
SMALL = [word for word in TINY_EXACT if not word.endswith("=null")]
SMALL += [
    "model=small",
    "data.image_size=64",
    "model.conv3.channels=4",
    "model.conv4.channels=4",
    "model.fc7.features=16",
    "trainer.snapshots=[1,2]",
    "trainer.checkpoint_epochs=[1]",
]
EXTRA = {  # overrides that make a job cheap, or possible with 80 images
    "benchmark": [*SMALL, "job.rounds=1", "job.steps=1", "job.warmup=0"],
    "attribution": ["job.boxed_images=2"],
    "correspondence": ["job.split=train", "job.places=99", "job.count=20"],
    "deconvnet": ["job.maps=2", "job.ablation=2", "job.max_images=20", "job.top=2"],
    "forced_choice": [
        *("job.split=train", "job.maps=2", "job.references=2", "job.trials=2", "job.extreme=0.5", "job.quiz=1")
    ],
    "import": [  # the layers of `small_zfnet`
        *(f"model.conv{n}.channels={channels}" for n, channels in enumerate((4, 6, 5, 5, 6), 1)),
        *("model.fc6.features=12", "model.fc7.features=11", "data.image_size=64"),
    ],
    "evolution": ["job.max_images=20"],
    "export": ["job.format=pt2"],  # the job's own tests export to ONNX
    "invariance": ["job.steps=5", "job.mean_images=10"],
    "occlusion": ["job.stride=12", "job.boxed_images=2"],
    "train": SMALL,
    "verdict": [
        f"job.{key}"
        for key in (
            "layers=[conv5]",
            "images=4",
            "units=2",
            "others=1",
            "metrics=[own,ablation]",
            "ablation_images=8",
            "cells=2",
        )
    ],
}
RUN = "outputs/train/first"
PLACEHOLDERS = {
    "job.sweep=<dir>": "job.sweep=outputs/sweeps/lr",
    "<dir>": RUN,
    "<other>": "other",
    **{f"source={name}": "source=zfnet.pth" for name in ("alexnet", "zfnet512.onnx", "zfnet.safetensors")},
    "job.epoch=5": "job.epoch=1",
    "data.image_size=24": "data.image_size=64",
    "job.epoch=6 data.image_size=32 trainer.epochs=10": "job.epoch=1 data.image_size=68 trainer.epochs=3",
    "trainer.epochs=15": "trainer.epochs=3",
    "trainer.epochs=20": "trainer.epochs=3",
    "checkpoint_epochs=[5]": "checkpoint_epochs=[1]",
    "outputs/train/…": RUN,
    "run=outputs/again": f"run={RUN}",
    **{f"run=outputs/sweeps/{name}/all_$seed": f"run={RUN}" for name in ("price", "parts")},
    **{f"job.sweep=outputs/sweeps/{name}": "job.sweep=outputs/sweeps/lr" for name in ("price", "parts")},
    "$views": "flip",
    r"${name}_\${seed}": "all_${seed}",
    ",https://…": "",
    ',"https://example.org/a.jpg"': "",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def one_command_per_line(block: str) -> str:
    """Return a block with one command a line: join continued lines, unwrap loops, inline functions that end in "$@"."""
    text = re.sub(r"^ *(for .*; do|done)$", "", block.replace("\\\n", " "), flags=re.M)
    for name, command in re.findall(r"^(\w+)\(\) \{\n.*?(python .*?) *\"\$@\"\n\}$", text, re.S | re.M):
        text = re.sub(rf"^{name}\(\) \{{.*?^\}}$", "", text, flags=re.S | re.M)
        text = re.sub(rf"^{name} \w+", lambda _, c=command: c, text, flags=re.M)  # drop its first argument
    return text


def commands(page: Path) -> list[str]:
    """Return the commands in bash blocks, and the inline code that starts with `python`, `pip` or `tensorboard`."""
    lines = "\n".join(map(one_command_per_line, blocks(page, "bash"))).splitlines()
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    inline = re.findall(r"`((?:python|pip|tensorboard) [^`]+)`", prose)
    return [" ".join(line.partition(" #")[0].split()) for line in lines + inline if line.strip()]


def all_commands() -> list[str]:
    found = [c for page in PAGES for c in commands(page) if page.name != TESTED_ELSEWHERE or "run.py" not in c]
    single = [part.removeprefix(".venv/bin/") for command in found for part in command.split(" && ")]
    once = {re.sub(r" run=\S+", " run=…", command): command for command in reversed(single)}
    return list(once.values())[::-1]


def words_of(command: str) -> list[str]:
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    return shlex.split(command.replace("$PWD", str(Path.cwd())))


def settings(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))


def first_and_last_job(words: list[str]) -> Iterator[list[str]]:
    """Yield the words of a sweep's first and last job, of the first if only seeds differ, or words without a sweep."""
    swept = [o for o in OverridesParser.create().parse_overrides(words) if o.is_sweep_override()]
    kept = [word for word in words if word not in [o.input_line for o in swept]]
    for end in (0, -1) if any(o.key_or_group != "seed" for o in swept) else (0,):
        chosen = []
        for o in swept:
            interval = not o.is_discrete_sweep()
            values = [o.value().start, o.value().end] if interval else list(o.sweep_string_iterator())
            chosen.append(f"{o.key_or_group}={values[end]}")
        yield kept + chosen


def checked(words: list[str]) -> Config:
    """Return the config of these words, after the checks that raise UserError before a training starts."""
    words = prepare_overrides(words)
    own = [w for w in words if not w.lstrip("+").startswith("hydra")]
    config = read_command(compose_raw(words), own, sources=())
    if config.job.trains:
        check_recipe(config)
    return config


def with_small(words: list[str], extra: list[str]) -> list[str]:
    return words + [e for e in extra if e.split("=")[0] not in settings(words)]


def is_cheap(words: list[str]) -> bool:
    given = settings(words)
    if "-m" in words or given.get("job.subject") == "choices":  # needs many runs or a compiler
        return False
    return "job" in given or given.get("experiment") == "quickstart" or "--help" in words or "--config-name" in words


def is_training(words: list[str]) -> bool:
    """Return whether these words start one single-process training that needs no later epochs or initial weights."""
    keys = ("devices", "snapshots", "checkpoint_epochs", "init_from")
    other = {"job", "hydra.run.dir", *(f"trainer.{key}" for key in keys)}
    return not (other & settings(words).keys() or "-m" in words)


def at_tiny_size(words: list[str]) -> list[str]:
    """Return the words of a tiny training, on built-in images unless the words name the folder `photos`."""
    small = [*TINY_EXACT[1:], "trainer.epochs=1", "model=small", "data.image_size=112", "trainer.snapshots=[]"]
    if "data.root=photos" in words:  # it has two training images per class
        small = [word for word in small if not word.startswith("data.t")]
        return with_small(words, ["data.validation=0.5", "data.batch_size=2", *small])
    kept = [word for word in words if not re.match(r"data(\.root)?=", word)]
    return with_small(kept, ["data=shapes", "data.store_size=64", *small])


def at_test_size(words: list[str]) -> list[str]:
    """Return the words that run a job or a training in a test."""
    if not is_cheap(words):
        return at_tiny_size(words)
    extra = [] if {"--config-name", "--help"} & set(words) else EXTRA.get(settings(words).get("job", "train"), [])
    return with_small(words, extra)


def commands_to_run() -> set[str]:
    """Return README's jobs and trainings, and those of other pages with a choice that no other one of its job has."""
    of_readme, chosen, seen = set(commands(README)), set(), set()
    for command in sorted(all_commands(), key=lambda command: command not in of_readme):
        _, *words = words_of(command)
        words = words[words.index("run.py") + 1 :] if "run.py" in words else ["-m"]
        if is_cheap(words) or is_training(words):
            job = settings(words).get("job", "train")
            choice = re.compile(r"(?!run=|seed=)[^=.]+=|job\.(layers?|epoch)=")
            choices = {(job, word) for word in at_test_size(words) if choice.match(word)}
            if command in of_readme or not choices <= seen:
                chosen.add(command)
                seen |= choices
    return chosen


def two_jobs(words: list[str]) -> list[str]:
    """Return the words of a two-job sweep: the first two values of the first swept key, the first of the others."""
    kept, most = [], 2
    for word in words:
        key, _, values = word.partition("=")
        if "," in values and "(" not in values:
            word, most = f"{key}={','.join(values.split(',')[:most])}", 1
        kept.append(word)
    return [*kept, *(["hydra.sweeper.n_trials=2"] if "hydra/sweeper=optuna" in words else [])]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages assume: a finished run, a sweep, and some images."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch, no_figures():
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(ROOT / "run.py"), *SMALL, f"hydra.run.dir={RUN}"])
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
    shutil.copytree(folder / RUN, folder / "outputs/sweeps/lr/seed=0")
    shutil.copytree(folder / RUN, folder / "other")
    other = zfnet.load_run(folder / "other")  # simulates another seed
    with torch.no_grad():
        other.model.conv1.weight.neg_()
    (folder / "other/results.json").unlink()
    save_model(folder / "other/model.safetensors", other.model, other.metadata)
    classes = other.classes[:2]
    for split, count in (("train", 2), ("test", 1)):
        write_images(folder / "photos" / split, dict.fromkeys(classes, count), size=70)
    for name in ("scans", "dogs"):
        write_images(folder, {name: 4}, size=64)
    shutil.copy(folder / "scans/000.png", folder / "cat.jpg")
    points = [f"{n:03d}.png,{part},{x},30" for n in range(4) for part, x in (("left eye", 20), ("right eye", 40))]
    (folder / "dogs/points.csv").write_text("\n".join(["image,part,x,y", *points]) + "\n")
    torch.save(small_zfnet(10, 224).state_dict(), folder / "zfnet.pth")
    return folder


@pytest.fixture
def workspace(run_py, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path) -> Callable:
    """Return `run_py`, in a copy of the folder `finished`. Until the first call, the current folder is `finished`."""
    monkeypatch.chdir(finished)
    monkeypatch.setattr("zfnet.jobs.benchmark.matmul_peak", lambda _: 1e11)  # it takes two seconds

    def run_in_copy(*words: str) -> Answer:
        shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
        return run_py(*words)

    return run_in_copy


def small_zfnet(num_classes: int, image_size: int) -> zfnet.ZFNet:
    return zfnet.model.zfnet.ZFNet(num_classes, 64, tiny_model_config())


RUN_COMMANDS = commands_to_run()


@pytest.mark.parametrize("command", all_commands())
def test_command(workspace: Callable, command: str) -> None:
    head, *words = words_of(command)
    if "run.py" in words:
        assert head in ("python", "torchrun")
        check_run_py(workspace, words[words.index("run.py") + 1 :], command in RUN_COMMANDS)
        if "-m" in words and command in commands(README):
            check_sweep(workspace, words[1:])
    elif head == "pip":
        project = (ROOT / "pyproject.toml").read_text()
        assert words[0] == "install"
        if words[1] == "-e":
            assert set(re.findall(r"\w+", words[2])) <= set(re.findall(r"^(\w+) = \[", project, re.M))
        else:
            assert all(f'"{word}>=' in project for word in words[1:])
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words if word.startswith("tests"))
    elif words and words[0].startswith("benchmarks/"):
        source = (ROOT / words[0]).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
        if settings(words):
            checked(["job=benchmark", *(w for w in words if "=" in w)])
    else:
        assert command in (*SHELL, "python3 -m venv .venv", "tensorboard --logdir outputs")


def check_run_py(run_py: Callable, words: list[str], runs: bool) -> None:
    # a command that reads a run and runs below is checked by that; trainings run at a tiny size, so check the real one
    checks_itself = runs and is_cheap(words) and "run" in settings(words)
    if not any(word.startswith("--") for word in words) and not checks_itself:
        for job in first_and_last_job([word for word in words if word != "-m"]):
            checked(job)
    if runs:
        answer = run_py(*at_test_size(words))
        assert answer.code == 0, answer.err


def check_sweep(run_py: Callable, words: list[str]) -> None:
    answer = run_py(*with_small(two_jobs(words), [*TINY_EXACT, "trainer.epochs=1", "hydra.sweep.dir=two"]))
    assert answer.code == 0, answer.err
    assert len(read_csv("two/summary.csv")) == 2


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.name)
@pytest.mark.usefixtures("workspace")
def test_python(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> None:
    if page.name == TESTED_ELSEWHERE:
        pytest.skip("tests/examples/test_extend.py runs it")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zfnet, "ZFNet", small_zfnet)
    monkeypatch.setattr(zfnet, "compose", lambda words: compose(with_small(words, SMALL)))
    exec(compile("\n".join(blocks(page, "python")), str(page), "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []
    if page.name == TESTED_ELSEWHERE:  # it also names files that the reader creates
        return
    paths = re.findall(r"`((?:tests|zfnet|conf|docs|benchmarks|examples)/[\w./]+)`", text)
    assert [path for path in paths if not (ROOT / path).exists() and path != "conf/local.yaml"] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs/figures").iterdir()), ids=lambda path: path.name)
def test_pictures_are_in_full_colour(path: Path) -> None:
    assert Image.open(path).mode in ("RGB", "RGBA")


def test_readme_is_short_and_begins_with_the_set_up() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    assert commands(README)[:2] == SET_UP


def test_the_chinese_readme_has_the_same_set_up_and_commands() -> None:
    chinese = ROOT / "README.zh-CN.md"
    assert commands(chinese)[:2] == SET_UP
    of_readme = {words for words in commands(README) if "job=" in words}
    of_chinese = {words for words in commands(chinese) if "job=" in words}
    assert of_chinese <= of_readme
    assert len(of_chinese) > 10


def test_readme_names_every_choice_of_every_group_and_every_job() -> None:
    text = README.read_text(encoding="utf-8")
    rows = re.search(r"\| group \| choices \|\n.*?\n\n", text, re.S)
    assert rows is not None
    named: dict[str, set[str]] = {}
    group = ""
    for line in rows[0].strip().splitlines()[2:]:
        cells = line.split("|")
        group = group if "…" in cells[1] else cells[1].strip(" `")
        named.setdefault(group, set()).update(re.findall(r"`(\w+)`", cells[2]))
    for group, choices in named.items():
        assert {p.stem for p in (ROOT / "conf" / group).glob("*.yaml")} - {"base"} <= choices, group
    groups = {p.name for p in (ROOT / "conf").iterdir() if p.is_dir()} - {"job", "hydra"}
    assert groups <= named.keys()
    for path in (ROOT / "conf/job").glob("*.yaml"):
        assert path.stem == "train" or f"job={path.stem} " in text.replace("`", " "), path.stem


@pytest.mark.parametrize("experiment", ["quickstart", "cifar10_small"])
def test_readme_commands_train_with_the_experiments_for_a_cpu(experiment: str) -> None:
    rows = re.findall(r"^\| ([^|]+) \| `python run.py ?([^`]*)` \|$", README.read_text(encoding="utf-8"), re.M)
    assert len(rows) > 20
    for wish, words in rows:
        given = shlex.split(words)
        if "job" in settings(given) or "experiment" in settings(given) or "--help" in given or "224 px" in wish:
            continue
        for job in first_and_last_job([w for w in given if w != "-m"]):
            checked([f"experiment={experiment}", *job])


def test_reading_path_has_the_length_that_readme_states() -> None:
    stated = re.findall(r"\[`[^`]+`\]\(([^)]+\.py)\)\s+\((\d+)", README.read_text(encoding="utf-8"))
    assert len(stated) == 5
    for path, lines in stated:
        count = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert int(lines) == pytest.approx(count, rel=0.15), path
