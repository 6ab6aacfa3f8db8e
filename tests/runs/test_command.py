"""A recorded run as the base of a command: what overrides change, and what must not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import zfnet
from tests.conftest import ROOT
from tests.helpers import TINY, TINY_EXACT, claim, compose
from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.config.trust import parse_overrides
from zfnet.runs import command as composing
from zfnet.runs.command import CONF, apply_overrides, prepare_overrides, read_command
from zfnet.runs.directory import RunDirectory

OWN = {"job": {"name": "train"}, "run": None, "images": None}


def record(folder: Path, *words: str) -> RunDirectory:
    """Make a run directory with the record that `python run.py WORDS` would leave, including Hydra's."""
    run = RunDirectory(folder)
    claim(run, compose(*words))
    (folder / ".hydra").mkdir()
    text = OmegaConf.to_yaml(composing.compose_raw(words))
    (folder / ".hydra/config.yaml").write_text(text)
    return run


@pytest.fixture(scope="module")
def onecycle(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return record(tmp_path_factory.mktemp("record") / "run", *TINY, "optimizer.weight_decay=0.5", "seed=3")


def without_own(config: Config) -> dict:
    return {k: v for k, v in config.to_dict().items() if k not in OWN}


def test_no_overrides_give_the_record_itself(onecycle: RunDirectory) -> None:
    assert apply_overrides(onecycle, [], OWN) == onecycle.read_config()


def test_a_key_override_sets_that_key(onecycle: RunDirectory) -> None:
    config = apply_overrides(onecycle, ["trainer.epochs=7", "model.conv1.kernel_size=9", "seed=5"], OWN)
    expected = onecycle.read_config().to_dict()
    expected["trainer"]["epochs"], expected["seed"] = 7, 5
    expected["model"]["conv1"]["kernel_size"] = 9
    assert without_own(config) == {k: v for k, v in expected.items() if k not in OWN}


def test_a_key_that_follows_another_still_follows_it(onecycle: RunDirectory) -> None:
    assert onecycle.read_config().scheduler["max_lr"] == 1e-3
    config = apply_overrides(onecycle, ["optimizer.lr=0.05"], OWN)
    assert config.scheduler["max_lr"] == 0.05
    assert config.optimizer == {**onecycle.read_config().optimizer, "lr": 0.05}


def test_images_that_were_moved_are_the_parents_too(tmp_path: Path) -> None:
    """If a parent had other images than its child, their folder does not change."""
    run = record(tmp_path / "run", "data=folder", "data.root=old")
    plain = run.recorded_config()
    plain["trainer"]["epochs"] = 9
    link = {"run": "x", "epoch": 1, "step": 1, "weights_sha256": "0", "identity": "0", "schedule": "stretch"}
    other = {**plain, "data": {**plain["data"], "root": "other"}}
    middle = {**plain, "parent": {**link, "config": other}}
    plain["parent"] = {**link, "config": middle}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(plain))
    parent = apply_overrides(run, ["data.root=new"], OWN).parent
    assert parent.config["data"]["root"] == "new"
    assert parent.config["parent"]["config"]["data"]["root"] == "other"


def test_a_group_override_swaps_the_whole_group(onecycle: RunDirectory) -> None:
    config = apply_overrides(onecycle, ["optimizer=sgd", "scheduler=step", "scheduler.gamma=0.3"], OWN)
    assert config.optimizer == compose("optimizer=sgd").optimizer  # AdamW's betas and the decay are gone
    assert config.scheduler == {**compose("scheduler=step").scheduler, "gamma": 0.3}
    assert config.seed == 3
    assert config.data == onecycle.read_config().data


def test_a_rate_reaches_the_schedule_of_a_record_that_holds_numbers(onecycle: RunDirectory, tmp_path: Path) -> None:
    """Reproductions leave records like this, because Hydra does not compose their configs."""
    plain = RunDirectory(tmp_path / "plain")
    plain.folder.mkdir()
    (plain.folder / "config.yaml").write_bytes((onecycle.folder / "config.yaml").read_bytes())
    for run in (onecycle, plain):
        assert apply_overrides(run, ["optimizer.lr=0.2"], OWN).scheduler["max_lr"] == 0.2
        assert apply_overrides(run, ["optimizer.lr=0.2", "scheduler.max_lr=0.3"], OWN).scheduler["max_lr"] == 0.3


def test_the_order_of_words_does_not_matter(onecycle: RunDirectory) -> None:
    words = ["optimizer.lr=0.2", "optimizer=sgd"]
    assert apply_overrides(onecycle, words, OWN) == apply_overrides(onecycle, words[::-1], OWN)
    assert apply_overrides(onecycle, words, OWN).optimizer["lr"] == 0.2


def test_current_defaults_do_not_change_a_record(onecycle: RunDirectory, tmp_path: Path, monkeypatch) -> None:
    """If a later version of conf/ has other defaults, only a group that is chosen now gets them, not the record."""
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    for name, old, new in (
        ("config.yaml", "seed: 0", "seed: 99"),
        ("model/small.yaml", "dropout: 0.0", "dropout: 0.25"),
        ("optimizer/adamw.yaml", "lr: 1.0e-3", "lr: 0.777"),
        ("optimizer/sgd.yaml", "momentum: 0.9", "momentum: 0.111"),
        ("experiment/quickstart.yaml", "batch_size: 64", "batch_size: 3"),
    ):
        text = (conf / name).read_text()
        assert old in text
        (conf / name).write_text(text.replace(old, new))
    monkeypatch.setattr(composing, "CONF", conf)
    assert zfnet.compose(["optimizer=adamw"]).optimizer["lr"] == 0.777  # composed from the changed files
    before = onecycle.read_config()
    for words in ([], ["trainer.epochs=9"]):
        config = apply_overrides(onecycle, words, OWN)
        assert (config.seed, config.model, config.optimizer) == (3, before.model, before.optimizer)
        assert config.data == before.data
    swapped = apply_overrides(onecycle, ["optimizer=sgd"], OWN)
    assert swapped.optimizer["momentum"] == 0.111
    assert swapped.seed == 3


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("experiment=blog", "experiment=blog: sets keys of several groups and cannot be applied to"),
        ("debug=batch", "debug=batch: sets keys of several groups and cannot be applied to"),
        ("trainer.epoch=3", "trainer.epoch: no such key; did you mean 'epochs'?"),
        ("++model.conv1.kernel=3", "model.conv1.kernel: no such key; did you mean 'kernel_size'?"),
        ("trainer.epochs=0", "trainer.epochs=0: must be at least 1"),
        ("colour=red", "colour: no such key"),
        ("seed.x=1", "seed={'x': 1}: must be a whole number"),
        ("~data.batch_size", "data.batch_size is missing"),
        ("~data.nothing", "cannot be set"),
    ],
)
def test_overrides_that_fit_no_record(onecycle: RunDirectory, word: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(onecycle, [word], OWN)
    assert expected in str(caught.value)


def test_a_deleted_key_is_gone(onecycle: RunDirectory) -> None:
    assert "weight_decay" not in apply_overrides(onecycle, ["~optimizer.weight_decay"], OWN).optimizer


def test_a_record_without_hydras_works_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    claim(run, compose(*TINY_EXACT))
    assert apply_overrides(run, ["optimizer.lr=0.5"], OWN).optimizer["lr"] == 0.5


@pytest.mark.parametrize(
    "hostile",
    [
        "root: ${oc.env:ZFNET_SECRET}",
        'root: "\\x24{oc.env:ZFNET_SECRET}"',
        'root: "$\\u007boc.env:ZFNET_SECRET}"',
        "root: ${oc.decode:${oc.env:ZFNET_SECRET}}",
        "root: ${${data.fit}:ZFNET_SECRET}",
        "root: ${seed}",  # a reference to a value is harmless
        "root: ${data.mean}",  # a reference to a list could multiply it
    ],
)
def test_a_strangers_record_reads_no_environment(tmp_path: Path, monkeypatch, hostile: str) -> None:
    """`data.root` is not part of a run's identity, so only the check for resolvers protects it."""
    monkeypatch.setenv("ZFNET_SECRET", "s3cret")
    run = record(tmp_path / "run", *TINY)
    path = run.folder / ".hydra/config.yaml"
    text = path.read_text()
    assert "\ndata:\n" in text
    path.write_text(text.replace("\ndata:\n", f"\ndata:\n  {hostile}\n"))
    config = apply_overrides(run, ["optimizer.lr=0.5"], OWN)
    assert "s3cret" not in str(config)
    assert config.data.root is None
    assert config.optimizer["lr"] == 0.5


@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.system ['touch witness']",
        "optimizer: !!python/name:os.system",
        "[",
        "just text",
        "x: &a [*a]",
        "",
        "optimizer: {_target_: os.system}",
        "seed: 4",
    ],
)
def test_a_damaged_hydra_record_is_not_used(tmp_path: Path, monkeypatch, content: str) -> None:
    monkeypatch.chdir(tmp_path)
    run = record(tmp_path / "run", *TINY)
    (run.folder / ".hydra/config.yaml").write_text(content)
    config = apply_overrides(run, ["trainer.epochs=4"], OWN)
    assert (config.trainer.epochs, config.seed) == (4, 0)
    assert config.optimizer["_target_"] == "torch.optim.AdamW"
    assert not (tmp_path / "witness").exists()


def test_a_hydra_record_of_another_run_is_not_used(tmp_path: Path) -> None:
    run = record(tmp_path / "run", *TINY)
    other = OmegaConf.to_yaml(composing.compose_raw([*TINY, "optimizer=sgd"]))
    (run.folder / ".hydra/config.yaml").write_text(other)
    assert apply_overrides(run, ["trainer.epochs=4"], OWN).optimizer["_target_"] == "torch.optim.AdamW"


@pytest.mark.parametrize(
    "content",
    ["optimizer: ${oc.env:HOME}", "!!python/object/apply:os.system ['true']", "[1, 2]", "", "job: {name: train}"],
)
def test_a_damaged_record_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        apply_overrides(RunDirectory(tmp_path), [], OWN)
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))
    assert "\n" not in str(caught.value)


def test_prepare_overrides_marks_keys_of_swept_groups() -> None:
    words = ["optimizer=sgd,rmsprop", "optimizer.momentum=0.5", "model.dropout=0.1", "job.top=1"]
    assert prepare_overrides(words) == words
    assert prepare_overrides(["-m", *words]) == ["-m", words[0], "++optimizer.momentum=0.5", *words[2:]]
    words[0] = "experiment=quickstart,blog"
    assert prepare_overrides(["--multirun", *words])[1:] == [words[0], *(f"++{w}" for w in words[1:3]), "job.top=1"]


def test_flags_among_overrides_come_first(run_py) -> None:
    assert prepare_overrides(["optimizer=sgd", "-m", "seed=0,1"]) == ["-m", "optimizer=sgd", "seed=0,1"]
    answer = run_py("job=occlusion", "--help", "job.count=2")
    assert answer.code == 0
    assert "job.count" in answer.out


def test_prepare_overrides_marks_keys_only_where_a_run_is_named() -> None:
    words = ["job=resume", "optimizer.momentum=0.5", "optimizer=sgd", "hydra.run.dir=x", "+a.b=1", "seed=1"]
    assert prepare_overrides(words) == words
    assert prepare_overrides([*words, "run=null"]) == [*words, "run=null"]
    assert prepare_overrides([*words, "run=x"]) == [
        "job=resume",
        "++optimizer.momentum=0.5",
        "optimizer=sgd",
        "hydra.run.dir=x",
        "+a.b=1",
        "seed=1",
        "run=x",
    ]


@pytest.mark.parametrize(
    ("word", "expected", "value"),
    [
        ("data.root=Bilder/Größe", 'data.root="Bilder/Größe"', "Bilder/Größe"),
        ("run=größe", 'run="größe"', "größe"),
        ("images=[größe.jpg, x y ö.png,a.png]", 'images=["größe.jpg","x y ö.png",a.png]', None),
        ('images=["cat, dog.jpg",größe.png]', None, ["cat, dog.jpg", "größe.png"]),
        ("images=[größe.jpg, x y ö.png,a.png]", None, ["größe.jpg", "x y ö.png", "a.png"]),
        ('images=["it\'s, mine.png",b (1).png]', None, ["it's, mine.png", "b (1).png"]),
        ("images=cat (1).jpg", 'images="cat (1).jpg"', "cat (1).jpg"),
        ("images=q\"u'o\\.png", None, "q\"u'o\\.png"),
        ("data.root='Größe'", "data.root='Größe'", "Größe"),
        ("data.root=${oc.env:Größe}", "data.root=${oc.env:Größe}", None),
        ("optimizer.lr=choice(1,2", 'optimizer.lr="choice(1,2"', None),  # not a sweep over two values
        ("trainer.ema=choice(null,0.5)", "trainer.ema=null,0.5", None),
        ("model.name=größe,b", 'model.name="größe",b', None),
        ("--config-path=größe", "--config-path=größe", None),
        ("ü=3", "ü=3", None),
        # names with and without an existing file
        ("images=a,b.png", 'images="a,b.png"', "a,b.png"),
        ("images=c,d.png", "images=c,d.png", None),
        ("images=[1e5,2e5,k=v.png]", 'images=["1e5",2e5,"k=v.png"]', ["1e5", 2e5, "k=v.png"]),
        ("images=5", 'images="5"', "5"),
        ("data.root=[x]", 'data.root="[x]"', "[x]"),
        ("seed=5", "seed=5", 5),
        ("images=plain.png", "images=plain.png", "plain.png"),
    ],
)
def test_values_that_hydra_would_misread_are_quoted(tmp_path: Path, monkeypatch, word, expected, value) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.png", "1e5", "k=v.png", "5", "[x]", "plain.png"):
        Path(name).touch()
    word = prepare_overrides([word])[0]
    assert expected in (None, word)
    assert value is None or parse_overrides([word])[0].value() == value


def test_an_interpolation_on_the_command_line_follows_the_record(onecycle: RunDirectory) -> None:
    words = ["job=summary", f"run={onecycle.folder}", "optimizer.lr=0.25", "data.std=[1.0,1.0,${optimizer.lr}]"]
    raw = composing.compose_raw(prepare_overrides(words))
    assert read_command(raw, words, sources=()).data.std == [1.0, 1.0, 0.25]


@pytest.mark.parametrize("word", ["model={}", "optimizer={}", "model.conv2={}", "+data.root={}"])
def test_an_empty_group_is_refused(word: str) -> None:
    with pytest.raises(UserError, match=r"=\{\}: is empty; set keys, as in "):
        read_command(composing.compose_raw(["job=summary"]), ["job=summary", word], sources=())


def test_read_command_lays_words_on_the_named_run(onecycle: RunDirectory) -> None:
    words = ["job=summary", f"run={onecycle.folder}", "model.dropout=0.3"]
    raw = composing.compose_raw(prepare_overrides(words))
    config = read_command(raw, words, sources=())
    assert config.job.name == "summary"
    assert config.run == str(onecycle.folder)
    assert config.model.dropout == 0.3
    assert config.seed == 3


def test_a_record_holds_values_only(onecycle: RunDirectory) -> None:
    text = (onecycle.folder / "config.yaml").read_text()
    assert "${" not in text
    assert "auto" in text  # hardware-dependent values are recorded as auto
    assert yaml.safe_load(text)["scheduler"]["max_lr"] == 1e-3


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("MLflowLogger", "tracking_uri", "sqlite:////elsewhere.db"),
        ("TrackioLogger", "space_id", "somebody/space"),
        ("WandbLogger", "mode", "online"),
        ("WandbLogger", "entity", "somebody"),
    ],
)
def test_a_records_logger_sends_nothing_elsewhere(tmp_path: Path, name: str, key: str, value: str) -> None:
    run = record(tmp_path / "run", *TINY)
    plain = run.recorded_config()
    plain["logger"] = {"mine": {"_target_": f"zfnet.training.loggers.{name}", key: value}}
    (run.folder / "config.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError, match=rf"its logger.mine.{key}={value} sends results elsewhere"):
        apply_overrides(run, [], OWN)
    assert apply_overrides(run, ["logger=none"], OWN).logger == {}


def test_a_job_of_ones_own_needs_a_name(run_py, tmp_path: Path) -> None:
    (tmp_path / "own/job").mkdir(parents=True)
    text = "# @package _global_\njob: {_target_: zfnet.jobs.summary.SummaryJob}\n"
    (tmp_path / "own/job/mine.yaml").write_text(text)
    answer = run_py("--config-dir", "own", "job=mine")
    assert answer.error == "job._target_=zfnet.jobs.summary.SummaryJob: the job's file must also set job.name"
    assert not (tmp_path / "outputs").exists()


def test_an_installed_package_says_that_it_lacks_conf(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("zfnet.runs.command.CONF", tmp_path / "conf")
    with pytest.raises(UserError, match=r"conf/, which is not at .*/conf; run pip install -e \.$"):
        composing.compose_raw([])


def test_groups_for_a_run_come_from_the_commands_folders(run_py, tiny_run: RunDirectory) -> None:
    words = ("--config-dir", str(ROOT / "examples/extend/conf"), "imports=[examples]", "job=summary")
    answer = run_py(*words, f"run={tiny_run.folder}", "augment=speckle", "augment.flip=0.25")
    assert answer.code == 0, answer.err
    for word in ("~logger", "~callbacks", "logger=none"):
        assert run_py("job=summary", f"run={tiny_run.folder}", word).code == 0
