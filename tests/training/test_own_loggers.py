"""Weights & Biases, MLflow and Trackio offline: a resumed run stays the same run, and nothing uses the network."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import compose_checked, other_process, train_tiny_exact, train_until_killed, weights_and_history
from zfnet.config.errors import UserError
from zfnet.runs.directory import RunDirectory

LOG_EVERY = 3  # of 16 steps: five log calls, one before the kill


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[str]]]:
    """The address of a proxy that answers no request, and the list of requests that it received."""
    came: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:  # closed
                    return
                with client:
                    came.append(client.recv(200).decode(errors="replace"))

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", came


def killed_and_resumed(folder: Path, *words: str) -> None:
    train_until_killed(folder, 5, *words)
    train_tiny_exact(folder, *words)


@pytest.fixture
def train(tmp_path: Path, proxy, reference_run, monkeypatch):
    """Return a function that trains with a logger, with a kill in between, and returns the run directory.

    It trains in another process, because these packages have global state.
    """

    def call(name: str) -> Path:
        pytest.importorskip(name)
        address, came = proxy
        with monkeypatch.context() as patch:
            for variable in ("NO_PROXY", "no_proxy"):
                patch.delenv(variable, raising=False)
            for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"):
                patch.setenv(variable, address)
            patch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
            patch.setenv("HF_TOKEN", "hf_secret")
            words = [f"logger={name}", f"trainer.log_every={LOG_EVERY}"]
            with other_process(killed_and_resumed, tmp_path / "r", *words) as process:
                process.join()
        assert process.exitcode == 0
        assert came == []
        assert weights_and_history(RunDirectory(tmp_path / "r")) == reference_run
        return tmp_path / "r"

    return call


@pytest.mark.slow
def test_wandb(train) -> None:
    folder = train("wandb")
    parts = sorted((folder / "wandb").glob("offline-run-*"))
    kept = (folder / "wandb" / "run_id").read_text()
    assert len(parts) == 2
    assert all(f"-{kept}" in part.name for part in parts)
    steps = [int(row["step"]) for part in parts for row in _wandb_rows(part / f"run-{kept}.wandb") if "step" in row]
    assert steps == [3, 6, 9, 12, 15]
    last = _wandb_rows(parts[1] / f"run-{kept}.wandb")
    assert [row["epoch"] for row in last if "epoch" in row] == ["1", "2"]
    assert all("epoch/validation_loss" in row for row in last if "epoch" in row)


def _wandb_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of metrics in a W&B file (protocol buffers in LevelDB's log format), as JSON texts."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, rows, text = path.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)  # after the checksum
        text += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record, text = Record.FromString(text), b""
            items = record.history.item
            if items:
                rows.append({"/".join(item.nested_key) or item.key: item.value_json for item in items})
        if (left := -place % 32768) < 7:  # the rest of the block is too small for a chunk
            place += left
    return rows


@pytest.mark.slow
def test_mlflow(train, monkeypatch) -> None:
    folder = train("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'zfnet'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == (folder / "mlflow" / "run_id").read_text()
    assert run.info.status == "FINISHED"
    assert run.data.params["model.conv1.channels"] == "4"
    history = client.get_metric_history(run.info.run_id, "step/train_loss")
    assert [metric.step for metric in history] == [3, 6, 9, 12, 15]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "epoch/validation_loss")] == [1, 2]
    assert "result/test_accuracy" in run.data.metrics


@pytest.mark.slow
def test_trackio(train, tmp_path: Path) -> None:
    folder = train("trackio")
    with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "zfnet.db")) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in rows} == {(folder / "trackio" / "run_name").read_text()}
    metrics = [json.loads(text) for _, _, text in rows]
    assert [row[1] for row, m in zip(rows, metrics, strict=True) if "step/lr" in m] == [3, 6, 9, 12, 15]
    assert [m["epoch"] for m in metrics if "epoch/validation_loss" in m] == [1, 2]
    assert "result/test_accuracy" in metrics[-1]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named(monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        compose_checked("experiment=quickstart", f"logger={name}")
    assert str(error.value) == f"this needs {name}: pip install -e '.[{name}]'"
