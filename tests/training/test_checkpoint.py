"""Checkpoint files: writes are atomic, the newest undamaged file is found, and no code in a file is executed."""

from __future__ import annotations

import json
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save

from tests.helpers import Trap, compose_checked, raise_disk_full
from zfnet.config.errors import UserError
from zfnet.model.build import read_tensors
from zfnet.runs import directory as run_module
from zfnet.training.build import build_optimizer
from zfnet.training.checkpoint import (
    BEST_FILE,
    KEPT,
    Checkpoint,
    CheckpointWriter,
    load_optimizer,
    pack,
    read_checkpoint,
    read_newest,
    step_files,
    step_name,
    strip_prefix,
    unpack,
)


@pytest.fixture
def writer(tmp_path: Path):
    one = CheckpointWriter(tmp_path / "checkpoints")
    yield one
    one.thread.shutdown()


def make_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        {"a": torch.full((3,), float(step)), "b": torch.tensor(step), "half": torch.ones(2).bfloat16()},
        {"step": step, "best": None, "history": [{"loss": 0.1 + 0.2}], "nested": {"x": [1, 2.5, "é"]}},
    )


def test_round_trip(writer: CheckpointWriter) -> None:
    writer.write(step_name(7), make_checkpoint(7))
    writer.wait()
    saved = read_checkpoint(writer.folder / "step-000000007.safetensors")
    assert saved.metadata == make_checkpoint(7).metadata
    assert {k: v.dtype for k, v in saved.tensors.items()} == {k: v.dtype for k, v in make_checkpoint(7).tensors.items()}
    assert all(torch.equal(saved.tensors[k], v) for k, v in make_checkpoint(7).tensors.items())


def test_the_newest_are_kept_and_the_best_too(writer: CheckpointWriter) -> None:
    writer.write(BEST_FILE, make_checkpoint(1), prune=False)
    for step in (1, 2, 9, 10, 100_000):
        writer.write(step_name(step), make_checkpoint(step))
    writer.wait()
    assert [p.name for p in step_files(writer.folder)] == [step_name(10), step_name(100_000)]
    assert len(list(writer.folder.iterdir())) == KEPT + 1
    newest, problems = read_newest(writer.folder)
    assert newest is not None
    assert newest.metadata["step"] == 100_000
    assert problems == []


def test_unreadable_files_of_later_steps_do_not_push_out_a_new_one(writer: CheckpointWriter) -> None:
    writer.folder.mkdir(parents=True, exist_ok=True)
    for step in (200, 300):
        (writer.folder / step_name(step)).write_bytes(b"damaged")
    for step in (10, 20, 30):
        writer.write(step_name(step), make_checkpoint(step))
    writer.wait()
    assert [p.name for p in step_files(writer.folder)] == [step_name(step) for step in (20, 30, 200, 300)]
    newest, problems = read_newest(writer.folder)
    assert newest is not None
    assert (newest.metadata["step"], len(problems)) == (30, 2)


def test_training_may_change_tensors_at_once(writer: CheckpointWriter, monkeypatch) -> None:
    gate = threading.Event()
    real = run_module.write_tensors

    def slow(*words) -> None:
        gate.wait(10)
        real(*words)

    monkeypatch.setattr("zfnet.training.checkpoint.write_tensors", slow)
    checkpoint = make_checkpoint(1)
    writer.write(step_name(1), checkpoint)
    checkpoint.tensors["a"].fill_(99)
    checkpoint.metadata["history"].append("later")
    gate.set()
    writer.wait()
    saved = read_checkpoint(writer.folder / step_name(1))
    assert saved.tensors["a"].tolist() == [1, 1, 1]
    assert saved.metadata["history"] == make_checkpoint(1).metadata["history"]


def _without(path: Path, name: str) -> None:
    facts, tensors = read_tensors(path)
    del tensors[name]
    path.write_bytes(save(tensors, facts))


def _changed_header(path: Path, change) -> None:
    facts, tensors = read_tensors(path)
    header = json.loads(facts["checkpoint"])
    change(header)
    path.write_bytes(save(tensors, {**facts, "checkpoint": json.dumps(header)}))


def _swap(path: Path) -> None:
    facts, tensors = read_tensors(path)
    path.write_bytes(save({**tensors, "a": tensors["a"].view(torch.int32)}, facts))


CHECKSUM = "its checksum differs"
DAMAGE = {
    **{f"cut {n}": (lambda path, n=n: path.write_bytes(path.read_bytes()[:n]), ".+") for n in (0, 1, 7, 8, 100, -1)},
    "a tensor": (lambda path: _without(path, "b"), CHECKSUM),
    "a key": (lambda path: _changed_header(path, lambda header: header.pop("history")), CHECKSUM),
    "a fact": (lambda path: _changed_header(path, lambda header: header.update(step=3)), CHECKSUM),
    "a type": (_swap, CHECKSUM),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_falls_back_to_the_previous_one(writer: CheckpointWriter, kind: str) -> None:
    damage, reason = DAMAGE[kind]
    for step in (1, 2):
        writer.write(step_name(step), make_checkpoint(step))
    writer.wait()
    path = writer.folder / step_name(2)
    damage(path)
    newest, (problem,) = read_newest(writer.folder)
    assert newest is not None
    assert newest.metadata["step"] == 1
    assert re.fullmatch(rf"{re.escape(str(path))} is damaged or not a checkpoint \({reason}\)", problem)


def test_every_flipped_bit_is_found(writer: CheckpointWriter) -> None:
    """Flip a bit in each byte of the file: in the length, the names, the metadata, the checksum and the tensors."""
    for step in (1, 2):
        writer.write(step_name(step), make_checkpoint(step))
    writer.wait()
    path = writer.folder / step_name(2)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        newest, problems = read_newest(writer.folder)
        same = newest is not None and newest.metadata["step"] == 2
        assert newest is not None
        # whitespace that pads the header is not part of the content
        assert len(problems) == 1 or (same and content[place] in b" \n\t")


@pytest.mark.parametrize("version", [1, 2])
def test_earlier_formats_have_no_checksum(tmp_path: Path, version: int) -> None:
    header = json.dumps({"format": version, "step": 4})
    (tmp_path / step_name(4)).write_bytes(save({"a": torch.ones(2)}, {"checkpoint": header}))
    assert read_newest(tmp_path)[0].metadata == {"step": 4}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 100,
        pickle.dumps({"model": 1}),
        save({"a": torch.ones(1)}),
        save({"a": torch.ones(1)}, {"checkpoint": "not json"}),
        save({"a": torch.ones(1)}, {"checkpoint": "null"}),
        save({"a": torch.ones(1)}, {"checkpoint": "[1]"}),
        save({"a": torch.ones(1)}, {"checkpoint": json.dumps({"format": 999})}),
        save({"a": torch.ones(1)}, {"checkpoint": json.dumps({"format": 3})}),
        save({"a": torch.ones(1)}, {"checkpoint": json.dumps({"format": 1, "optimizer": {}})}),
        save({"a": torch.ones(1)}, {"checkpoint": "[" * 100_000}),
        save({"a": torch.ones(1)}, {"checkpoint": "{}"}),
    ],
)
def test_an_invalid_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / step_name(1)
    path.write_bytes(content)
    with pytest.raises(UserError, match="step-000000001"):
        read_checkpoint(path)
    assert read_newest(tmp_path)[0] is None


def test_a_checkpoint_that_the_system_cannot_read_is_not_replaced(tmp_path: Path) -> None:
    """It can be intact, such as without permission or on a network drive that has lost its connection."""
    (tmp_path / step_name(1)).symlink_to(step_name(1))
    with pytest.raises(UserError, match=r"step-000000001\.safetensors cannot be read: Too many levels"):
        read_newest(tmp_path)


def test_a_pickle_is_not_executed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, tmp_path / step_name(1))
    assert read_newest(tmp_path)[0] is None
    assert not (tmp_path / "witness").exists()


def test_leftovers_of_a_kill_do_not_count(writer: CheckpointWriter) -> None:
    writer.write(step_name(3), make_checkpoint(3))
    writer.wait()
    (writer.folder / f".{step_name(4)}.123.partial").write_bytes(b"half")
    (writer.folder / "step-4.safetensors").write_bytes(b"")
    (writer.folder / BEST_FILE).write_bytes(b"")
    newest, problems = read_newest(writer.folder)
    assert newest is not None
    assert newest.metadata["step"] == 3
    assert problems == []


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert read_newest(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_last_good_one(writer: CheckpointWriter, monkeypatch, where: str) -> None:
    writer.write(step_name(1), make_checkpoint(1))
    writer.wait()
    with monkeypatch.context() as patch:
        if where == "write":

            def half(tensors, path, metadata) -> None:
                Path(path).write_bytes(b"half")
                raise SafetensorError("I/O error: No space left on device (os error 28)")

            patch.setattr(run_module, "save_file", half)
        else:
            patch.setattr(run_module.os, where, raise_disk_full)
        writer.write(step_name(2), make_checkpoint(2))
        with pytest.raises(UserError, match=r"step-000000002\.safetensors cannot be written: .*No space left"):
            writer.wait()
    assert [p.name for p in writer.folder.iterdir()] == [step_name(1)]
    assert read_newest(writer.folder)[0].metadata["step"] == 1
    writer.write(step_name(3), make_checkpoint(3))  # the writer works again when the disk has space
    writer.close()
    assert read_newest(writer.folder)[0].metadata["step"] == 3


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam", "rmsprop", "adagrad", "nadam"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_restored_optimizer_is_bit_identical(name: str, channels_last: bool, tmp_path: Path) -> None:
    config = compose_checked(f"optimizer={name}")

    def make():
        torch.manual_seed(0)
        layer = torch.nn.Conv2d(3, 5, 3)
        if channels_last:
            layer = layer.to(memory_format=torch.channels_last)
        return layer, build_optimizer(config, layer, fused=True)

    def step(layer, optimizer, k: int) -> None:
        generator = torch.Generator().manual_seed(k)
        layer(torch.randn(2, 3, 6, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = make()
    for k in range(6):
        step(whole, optimizer, k)
    layer, optimizer = make()
    for k in range(3):
        step(layer, optimizer, k)
    writer = CheckpointWriter(tmp_path)
    tensors: dict[str, torch.Tensor] = {}
    packed = pack(optimizer.state_dict(), "optimizer", tensors)
    writer.write("x.safetensors", Checkpoint(tensors, {"optimizer": packed}))
    writer.close()
    saved = read_checkpoint(tmp_path / "x.safetensors")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer, optimizer = make()
    layer.load_state_dict(state)
    load_optimizer(optimizer, unpack(saved.metadata["optimizer"], saved.tensors))
    for k in range(3, 6):
        step(layer, optimizer, k)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), whole.parameters(), strict=True))


def test_kernels_depend_on_the_device_and_not_on_the_checkpoint() -> None:
    """A run can start on a CPU and continue on a device without `fused`."""
    here, there = (torch.optim.Adagrad([torch.nn.Parameter(torch.ones(3))], fused=f) for f in (True, None))
    load_optimizer(there, here.state_dict())
    assert there.param_groups[0]["fused"] is None


def test_prefixes() -> None:
    one = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    both = {**{f"model.{name}": value for name, value in one.items()}, "model2.a.b": torch.ones(2)}
    assert strip_prefix("model", both).keys() == one.keys()


# -- nested values

plain_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
made_tensors = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.integers(-100, 100), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.float64]),
)
nested_values = st.recursive(
    plain_values | made_tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 9) | st.sampled_from(["1", "a", "a.b", "tensor", "dict"]), inner)
    ),
    max_leaves=12,
)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@given(nested_values)
def test_pack_and_unpack_give_the_same_nested_value(value: Any) -> None:
    tensors = {"x": torch.zeros(1)}  # a name that is already used
    packed = json.loads(json.dumps(pack(value, "x", tensors)))
    assert tensors["x"].tolist() == [0]
    assert_same(unpack(packed, tensors), value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [{1, 2}]}, "x.a.0: a checkpoint cannot store a set"),
        ([Path("p")], "x.0: a checkpoint cannot store a PosixPath"),
        ({"f": print}, "x.f: a checkpoint cannot store a builtin_function_or_method"),
        ({("a", 1): 2}, "x: a checkpoint cannot store a key that is a tuple"),
    ],
)
def test_pack_refuses_other_types_by_name(value: Any, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        pack(value, "x", {})
