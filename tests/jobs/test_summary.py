"""job=summary: the table of layers."""

from __future__ import annotations

import re

from torch import nn


def test_summary_lists_layers_with_shapes_parameters_and_multiply_adds(run_py) -> None:
    answer = run_py("job=summary", "model=zfnet")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "model=zfnet for 10 classes (cifar10), 224 px"
    cells = {line.split()[0]: line.split()[1:] for line in lines if line}
    # 7·7·3·96 + 96 parameters, and the same number of multiply-adds at each of 110·110 positions
    assert cells["conv1"] == ["Conv2d", *["2", "×", "96", "×", "110", "×", "110"], "14,208", "171,916,800"]
    assert cells["pool5"] == ["MaxPool2d", *["2", "×", "256", "×", "6", "×", "6"]]
    assert cells["fc8"] == ["Linear", "2", "×", "10", "40,970", "40,970"]
    assert cells["total"][0] == "58,301,578"


def test_summary_of_a_nested_network_names_its_layers_and_adds_them_up(run_py, tmp_path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/nested.yaml").write_text("_target_: torchvision.models.resnet18\n")
    answer = run_py("--config-dir", tmp_path / "conf", "job=summary", "experiment=quickstart", "model=nested")
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    assert ["layer4.1.conv2", "Conv2d"] in [line[:2] for line in lines]
    for column in (-2, -1):  # parameters, multiply-adds
        counts = {k: [int(row[column].replace(",", "")) for row in lines if k in row[:2]] for k in ("Conv2d", "Linear")}
        norms = [int(row[column].replace(",", "")) for row in lines if "BatchNorm2d" in row]
        (total,) = (int(row[column].replace(",", "")) for row in lines if row[:1] == ["total"])
        assert sum(counts["Conv2d"]) + sum(counts["Linear"]) + sum(norms) == total


def test_summary_counts_weights_that_no_memory_holds(run_py) -> None:
    words = (
        "model.width=100",
        "model.norm=lrn",
        "model.init=he",
        "trainer.init_from=lost.pth",
        "trainer.freeze=[conv1]",
    )
    answer = run_py("job=summary", *words)
    assert answer.code == 0, answer.err
    assert "4,096,010" in answer.out  # parameters of fc8; all weights would take 2 TB
    trainable, total = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) of ([\d,]+) parameters", answer.out)[0])
    assert total - trainable == 9600 * (3 * 7 * 7 + 1)  # conv1


def test_summary_and_benchmark_take_a_data_set_of_ones_own(run_py, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.benchmark.matmul_peak", lambda _: 1e11)  # takes two seconds
    own = ("imports=[tests]", "data=dataset", "+data.train._target_=tests.own.Items", "+data.train.count=24")
    sizes = ("data.test=null", "model=small", "data.image_size=64", "data.batch_size=8", "job.rounds=1", "job.steps=1")
    for job, more in (("summary", ()), ("benchmark", sizes[-3:])):
        answer = run_py(f"job={job}", *own, *sizes[:3], *more)
        assert answer.code == 0, answer.err


class Tokens(nn.Sequential):
    """A linear layer of the rows of images, which are its tokens."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Linear(64, 4), nn.Flatten(), nn.Linear(3 * 64 * 4, num_classes))


def test_summary_says_what_it_does_not_count(run_py, tmp_path) -> None:
    (tmp_path / "conf/model").mkdir(parents=True)
    (tmp_path / "conf/model/own.yaml").write_text(f"_target_: {__name__}.Tokens\n")
    words = ("--config-dir", tmp_path / "conf", "job=summary", "experiment=quickstart", "imports=[tests]")
    assert "too few multiply-adds: a Linear of tokens" in run_py(*words, "model=own").out
    assert "too few multiply-adds" not in run_py(*words).out
