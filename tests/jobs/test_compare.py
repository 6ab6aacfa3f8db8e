"""job=compare: differences between runs, tests over seeds, and rewriting a sweep's summary."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.sweeps.test_summary import write_job
from zfnet.config.errors import UserError
from zfnet.jobs.compare import Comparison, compare, draw_comparison, find_trainings, group, to_page, to_text
from zfnet.runs.directory import RunDirectory
from zfnet.sweeps.summary import Trained, read_training


def comparison_of(*folders: Path) -> Comparison:
    return compare(group([read_training(run, str(run.folder)) for run in find_trainings([str(f) for f in folders])]))


def rows_of(comparison: Comparison, title: str) -> list[list[str]]:
    return next((s.rows for s in comparison.sections if s.title.startswith(title)), [])


def trained(lr: float, seed: int, accuracy: float) -> Trained:
    """Return a training run like one that is read from its directory."""
    history = [{"epoch": e, "train_loss": lr / e, "validation_accuracy": accuracy} for e in (1, 2)]
    settings = {"optimizer.lr": lr}
    results = {"validation": {"accuracy": accuracy}}
    return Trained(f"lr={lr}", "done", None, {**settings, "seed": seed}, settings, seed, {}, results, history)


def test_compare_shows_only_what_differs(tmp_path: Path) -> None:
    a = write_job(tmp_path, "optimizer.lr=0.01", accuracy=0.5)
    b = write_job(tmp_path, "optimizer.lr=0.1", accuracy=0.25)
    for run, version in ((a, "1.0"), (b, "2.0")):
        run.write_json("environment.json", {"packages": {"torch": version, "numpy": "2"}, "command": [version]})
    comparison = comparison_of(a.folder, b.folder)
    assert rows_of(comparison, "Settings") == [["", "A", "B"], ["optimizer.lr", "0.01", "0.1"]]
    assert rows_of(comparison, "Environment") == [["", "A", "B"], ["packages.torch", "1.0", "2.0"]]
    assert rows_of(comparison, "Results") == [["", "A", "B"], ["validation accuracy", "50.00%", "25.00%"]]
    text = to_text(comparison, 80)
    assert "B first differs from A in epoch 1: validation_accuracy 0.5 and 0.25" in text
    assert "not tested: a test needs two or more seeds" in text


def test_compare_shows_the_untracked_files_that_differ(tmp_path: Path) -> None:
    runs = [write_job(tmp_path, f"optimizer.lr={lr}", accuracy=0.5) for lr in (0.01, 0.1)]
    for run, files in zip(runs, (["conf/a.yaml", "conf/b.yaml"], ["conf/b.yaml"]), strict=True):
        run.write_json("environment.json", {"code": {"untracked": files}})
    comparison = comparison_of(*(run.folder for run in runs))
    assert rows_of(comparison, "Environment") == [["", "A", "B"], ["code.untracked", "[conf/a.yaml]", "[]"]]


def test_compare_says_that_runs_are_equal(tmp_path: Path) -> None:
    runs = [write_job(tmp_path, f"trainer.log_every={n}", accuracy=0.5) for n in (1, 2)]
    comparison = comparison_of(*(run.folder for run in runs))
    assert "B equals A in all 2 epochs, and in the weights" in to_text(comparison, 80)
    assert rows_of(comparison, "Settings") == [["", "A", "B"], ["trainer.log_every", "1", "2"]]


def test_compare_shows_all_that_was_typed(tmp_path: Path) -> None:
    """A typed key is shown even if the runs' different choices for its group could explain the difference."""
    runs = [
        write_job(tmp_path, *words, accuracy=0.5)
        for words in (["optimizer=adamw"], ["optimizer=sgd", "optimizer.lr=0.5"])
    ]
    (runs[1].folder / ".hydra").mkdir()
    (runs[1].folder / ".hydra/overrides.yaml").write_text("[optimizer=sgd, ++optimizer.lr=0.5]")
    shown = [row[0] for row in rows_of(comparison_of(*(run.folder for run in runs)), "Settings")]
    assert shown == ["", "optimizer._target_", "optimizer.lr"]


def test_a_reproduction_among_runs_of_several_seeds_is_no_reason_not_to_test(capsys) -> None:
    runs = [trained(lr, seed, lr + seed * lr / 50) for lr in (0.1, 0.2) for seed in (0, 1, 2)]
    (test,) = compare(group([*runs, dataclasses.replace(runs[0], name="again")])).tests
    assert test == compare(group(runs)).tests[0]
    assert "again is left out: another run has the same settings and seed" in capsys.readouterr().err
    unreadable = [dataclasses.replace(runs[0], name=name, settings={}, seed=None) for name in "xy"]
    assert [len(g.runs) for g in group([*runs, *unreadable])] == [3, 3, 1, 1]
    assert len(group([runs[0], runs[0], runs[3]])) == 3  # one by one


def test_compare_tests_settings_over_their_seeds_and_marks_what_holds() -> None:
    accuracies = {0.01: (0.50, 0.51, 0.52), 0.1: (0.60, 0.61, 0.63), 0.2: (0.50, 0.66, 0.58)}
    runs = [
        trained(lr, n + (7 if lr == 0.2 else 0), a) for lr, values in accuracies.items() for n, a in enumerate(values)
    ]
    comparison = compare(group(runs))
    assert [row[0] for row in rows_of(comparison, "Differences")] == ["", "B ? C", "B beats A", "C ? A"]
    assert [(t["paired"], t["holds"]) for t in comparison.tests] == [(False, False), (True, True), (False, False)]
    by_pair = {t["better"] + t["other"]: t for t in comparison.tests}
    assert by_pair["BA"]["mean"] == pytest.approx(0.31 / 3)
    assert by_pair["BA"]["p_holm"] == pytest.approx(3 * by_pair["BA"]["p"])
    assert rows_of(comparison, "Results")[1][1:] == ["51.00 ± 1.00%", "61.33 ± 1.53%", "58.00 ± 8.00%"]
    assert "seed" not in [row[0] for row in rows_of(comparison, "Settings")]
    for width, rows in ((80, 1), (40, 2)):  # a narrow terminal shows the columns in two blocks
        plain, bold = to_text(comparison, width), to_text(comparison, width, bold=True)
        assert "\x1b" not in plain
        assert [line for line in bold.splitlines() if "\x1b[1m" in line] == [
            f"\x1b[1m{line}\x1b[0m" for line in plain.splitlines() if "beats" in line
        ]
        assert plain.count("B beats A") == rows
    assert to_page(comparison, b"").count("<tr class=bold>") == 1


def test_a_difference_that_holds_alone_may_not_hold_among_several() -> None:
    accuracies = {0.01: (0.50, 0.51, 0.52), 0.1: (0.60, 0.58, 0.58), 0.2: (0.40, 0.66, 0.58)}
    alone, several = (
        compare(group([trained(lr, n, a) for lr in rates for n, a in enumerate(accuracies[lr])])).tests
        for rates in ((0.01, 0.1), (0.01, 0.1, 0.2))
    )
    (again,) = [t for t in several if (t["better"], t["other"]) == ("B", "A")]
    assert alone[0]["p"] == again["p"] < 0.05
    assert (alone[0]["holds"], again["holds"]) == (True, False)


def test_compare_of_many_settings_tests_all_pairs_and_shows_the_best() -> None:
    comparison = compare(group([trained(lr, seed, lr / 10 + seed * lr**2 / 500) for lr in range(6) for seed in (0, 1)]))
    assert len(comparison.tests) == 15
    rows = rows_of(comparison, "Differences")
    assert [row[0][0] for row in rows[1:]] == ["F"] * 5
    text = to_text(comparison, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    # the groups that do not fit side by side follow below
    lines = text.splitlines()
    first = lines.index("Results") + 1
    assert [line.split() for line in lines[first : first + 4 : 2]] == [["A", "B", "C", "D"], ["E", "F"]]
    assert [line.split()[2] for line in lines[first + 1 : first + 4 : 2]] == ["0.00", "41.60"]
    narrow = to_text(comparison, 40)
    assert "  validation accuracy  A  0.00" in narrow  # one line per group instead of shortened names
    assert "Differences" in to_text(comparison, 20)


def test_test_accuracies_are_compared_only_where_asked(tmp_path: Path) -> None:
    runs = [write_job(tmp_path, f"optimizer.lr={n}", accuracy=0.5, test=n / 10) for n in (1, 2)]
    groups = group([read_training(run, str(run.folder)) for run in runs])
    assert "test" not in json.dumps(compare(groups).to_dict()["sections"][2])
    assert rows_of(compare(groups, "test"), "Results")[1] == ["test accuracy", "10.00%", "20.00%"]


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.drawn
def test_page_holds_everything_and_nothing_that_runs(run_py, tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert(1)&"
    folder.mkdir()
    write_job(folder, "optimizer.lr=0.01", accuracy=0.5)
    config = (write_job(folder, "optimizer.lr=0.1", accuracy=0.6).folder / "config.yaml").open("a")
    config.write('"<img src=x onerror=alert(1)>": 1\n')
    config.close()
    answer = run_py("job=compare", f"runs={folder.name!r}", "hydra.run.dir=c")
    assert answer.code == 0, answer.err
    page = _Page(Path("c/index.html").read_text())
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "table", "tr", "th", "td", "p", "img")
    }
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,iVBOR")
    assert folder.name in page.text
    assert "<img src=x" in page.text
    assert RunDirectory("c").state == "done"
    assert json.loads(Path("c/comparison.json").read_text())["split"] == "validation"
    assert max(map(len, answer.out.splitlines())) <= 80


def test_find_trainings_takes_directories_sweeps_and_patterns(tmp_path: Path) -> None:
    for n in (1, 2):
        write_job(tmp_path, f"optimizer.lr={n}", accuracy=0.5)
    (tmp_path / "other").mkdir()
    assert len(find_trainings([str(tmp_path)])) == 2
    assert len(find_trainings([str(tmp_path / "optimizer*")])) == 2
    assert len(find_trainings([str(tmp_path / "optimizer.lr=1"), str(tmp_path)])) == 2
    for items, problem in (
        (["nowhere"], r"runs: nowhere: there is no training run \(no history.csv\)$"),
        (["s/lr=1", "seed=0"], r"runs: s/lr=1: there is no training run \(no history.csv\); quote names with commas: "),
        ([str(tmp_path / "other")], r"there is no training run \(no history.csv\)$"),
        ([str(tmp_path / "optimizer.lr=1")] * 2, "names one training run"),
    ):
        with pytest.raises(UserError, match=problem):
            find_trainings(items)


@pytest.mark.drawn
def test_compare_writes_the_summary_again(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for n, lr in enumerate((0.01, 0.1)):
        write_job(tmp_path, f"optimizer.lr={lr}", accuracy=n / 10)
    answer = run_py("job=compare", f"job.sweep=~/{tmp_path.name}")
    assert answer.code == 0
    assert "2 settings, 2 jobs: 2 done" in answer.out
    assert (tmp_path / "summary.csv").read_text().count("\n") == 3
    assert Image.open(tmp_path / "figures/objective.png").width > 500
    assert not (tmp_path / "outputs").exists()


def test_compare_refuses_what_holds_no_training(run_py, tmp_path: Path) -> None:
    for words in (["job.sweep=."], [], ["runs=[nowhere,.]"]):
        assert run_py("job=compare", *words).error
        assert not (tmp_path / "outputs").exists()


def test_a_run_without_results_does_not_bring_the_test_set_in() -> None:
    runs = [trained(lr, 0, 0.5) for lr in (0.01, 0.1)]
    runs[1].results.clear()  # as of a run that is running or failed
    comparison = compare(group(runs))
    assert comparison.split == comparison.by_epoch == "validation"
    for run in runs:
        run.results["test"] = {"accuracy": 0.5}
    assert compare(group(runs), "test").by_epoch == "validation"  # epochs measured only validation
    axis = draw_comparison(group(runs), "test").axes[1]
    assert axis.get_title() == "Validation accuracy"
    assert len(axis.lines) == 2


def test_group_keeps_other_images_apart() -> None:
    """Runs on different images are not seeds of one setting."""
    runs = [trained(0.1, seed, 0.5) for seed in range(4)]
    runs = [dataclasses.replace(r, environment={"data_fingerprint": "ab"[n // 2] * 64}) for n, r in enumerate(runs)]
    runs = [dataclasses.replace(r, settings=dict(r.settings)) for r in runs]
    assert [len(g.runs) for g in group(runs)] == [2, 2]
    (row,) = [line for line in to_text(compare(group(runs)), 80).splitlines() if "data_fingerprint" in line]
    assert row.split() == ["data_fingerprint", "a" * 10, "b" * 10]


def test_curves_leave_out_the_epochs_that_were_not_measured() -> None:
    runs = [trained(lr, 0, 0.5) for lr in (0.01, 0.1)]
    runs[0].history[0]["validation_accuracy"] = None
    comparison = compare(group(runs))
    assert comparison.curves[0][1] == [None, 0.5]
    (line,) = [line for line in to_text(comparison, 80).splitlines() if line.startswith("  A   ") and "▁" in line]
    assert line.endswith(" ▁  50.0%")


def test_an_accuracy_of_0_is_an_accuracy() -> None:
    runs = [trained(lr, 0, 0.5) for lr in (0.01, 0.1)]
    for run in runs:
        run.results.update(validation=None, test={"accuracy": 0.0})
    assert compare(group(runs)).split == "test"


def test_differences_without_spread_are_said_to_have_none() -> None:
    (section,) = [
        s
        for s in compare(group([trained(lr, seed, 0.5) for lr in (0.01, 0.1) for seed in (0, 1)])).sections
        if s.title.startswith("Differences")
    ]
    assert section.notes == ("not tested: the differences do not vary from seed to seed",)
