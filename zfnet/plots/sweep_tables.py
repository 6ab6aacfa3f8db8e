"""A sweep as tables: summary.csv (a row a job), summary.md and the terminal (a row a setting)."""

from __future__ import annotations

import csv
import io
import shutil
from collections import Counter
from collections.abc import Sequence

from zfnet.plots.sweep import Setting, Sweep, SweepJob, say, short_names
from zfnet.runs.directory import write_atomically

OBJECTIVE = "validation accuracy"
MOST_ROWS = 40  # of a terminal
STATES = ("done", "running", "stopped", "pruned", "failed", "none")


def write_tables(sweep: Sweep) -> None:
    """Write summary.csv and summary.md into the sweep's directory."""
    write_atomically(sweep.folder / "summary.csv", to_csv(sweep))
    write_atomically(sweep.folder / "summary.md", to_markdown(sweep))


def to_csv(sweep: Sweep) -> str:
    """Return a row a job: directory, state, the swept keys, seed, figures on validation, error. Best setting first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = ("validation_accuracy", "validation_loss", "best_epoch", "epochs", "seconds")
    writer.writerow(["directory", "state", *sweep.keys, "seed", *figures, "error"])
    placed = [(job, setting) for setting in sweep.settings for job in setting.jobs]
    names = {job.name for job, _ in placed}
    placed += [(job, Setting({}, [job])) for job in sweep.jobs if job.name not in names]
    for job, setting in placed:
        validation = job.results.get("validation") or {}
        writer.writerow(
            [
                job.name,
                job.state,
                *(setting.values.get(key, "") for key in sweep.keys),
                job.seed,
                job.objective,
                validation.get("loss"),
                *(job.results.get(key) for key in ("best_epoch", "epochs", "seconds")),
                job.error,
            ]
        )
    return text.getvalue()


def to_markdown(sweep: Sweep) -> str:
    """Return the table over settings, what the best one is worth on test, and the failed jobs."""
    header, rows = _cells(sweep)
    lines = [f"# {count_line(sweep)}", ""]
    for row in [header, ["---"] * len(header), *rows]:
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    lines += ["", *_test_line(sweep), ""]
    lines += [f"- failed: `{job.name}`: {job.error}" for job in sweep.failed]
    return "\n".join(lines).rstrip() + "\n"


def to_text(sweep: Sweep, width: int | None = None) -> str:
    """Return the table for a terminal of `width` columns (None: this one), best first.

    Columns of swept keys that do not fit are left out, and counted, and so are rows beyond the best MOST_ROWS;
    summary.csv has them all.
    """
    width = width or shutil.get_terminal_size().columns
    header, rows = _cells(sweep)
    fixed = len(header) - len(sweep.keys)  # the columns after the keys
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    shown = list(range(len(header)))
    while sum(widths[i] + 2 for i in shown) - 2 > width and len(shown) > fixed + 1:
        del shown[-fixed - 1]
    lines = [count_line(sweep)]
    for row in [header, *rows[:MOST_ROWS]]:
        lines.append("  ".join(row[i].ljust(widths[i]) for i in shown).rstrip()[:width])
    if len(rows) > MOST_ROWS:
        lines.append(f"… and {len(rows) - MOST_ROWS} more, in summary.csv")
    if len(shown) < len(header):
        lines.append(f"not shown, but in summary.csv: {_count(len(header) - len(shown), 'swept key')}")
    return "\n".join([*lines, *_test_line(sweep)])


def count_line(sweep: Sweep) -> str:
    """Say how many settings and jobs there are, and how they stand."""
    states = Counter(job.state for job in sweep.jobs)
    stand = ", ".join(f"{states[s]} {s}" for s in STATES if states[s])
    return f"{_count(len(sweep.settings), 'setting')}, {_count(len(sweep.jobs), 'job')}: {stand}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _cells(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    names = short_names(sweep.keys)
    open_ends = any(job.state != "done" for setting in sweep.settings for job in setting.jobs)
    header = [*(names[key] for key in sweep.keys), OBJECTIVE, "n"] + ["state"] * open_ends
    rows = [
        [
            *(say(setting.values[key]) for key in sweep.keys),
            score_text(setting),
            str(len(setting.scores())),
            *[_states(setting.jobs)] * open_ends,
        ]
        for setting in sweep.settings
    ]
    return header, rows


def score_text(setting: Setting, part: str = "validation") -> str:
    """Return `71.23 ± 0.45 %`, without the deviation where there is one seed."""
    mean, std = setting.mean_and_std(part)
    if mean is None:
        return "–"
    return f"{100 * mean:.2f} %" if std is None else f"{100 * mean:.2f} ± {100 * std:.2f} %"


def _states(jobs: Sequence[SweepJob]) -> str:
    counts = Counter(job.state for job in jobs)
    return ", ".join(f"{counts[s]} {s}" if len(jobs) > 1 else s for s in STATES if counts[s])


def _test_line(sweep: Sweep) -> list[str]:
    best = sweep.settings[0] if sweep.settings else None
    if best is None or not best.scores() or not best.scores("test"):
        return []
    seeds = len(best.scores("test"))
    return [f"Test accuracy of the best setting by validation: {score_text(best, 'test')} (n = {seeds})"]
