"""The environment of a run: code, versions and machine, recorded so that differences can be explained later."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "numpy", "pillow", "safetensors", "matplotlib")
ROOT = Path(__file__).resolve().parents[2]
DIFF_LIMIT = 200_000  # characters


def describe_environment(device: torch.device, mode: str, imports: Sequence[str]) -> dict[str, Any]:
    """Return the code, packages and device as JSON-compatible values.

    imports: the packages that the command trusts; the source of those that it has imported is hashed
    """
    imported = {name: _source_hash(name) for name in imports if name in sys.modules}
    return {
        "mode": mode,
        "code": _code() | ({"imported": imported} if imported else {}),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_info().get("model name") or platform.processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "device": _device(device),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@functools.cache
def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _code() -> dict[str, Any]:
    """Return the git commit, the diff to it, and a hash of the source, which needs no git."""
    files = [(path.relative_to(ROOT).as_posix(), path) for path in sorted(ROOT.glob("zfnet/**/*.py"))]
    diff = _git("diff", "HEAD", "--", "zfnet", "conf", "run.py")
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", "zfnet", "conf")
    commit = _git("rev-parse", "HEAD")
    return {
        "source_sha256": _hash(files),
        "commit": commit and commit.strip(),
        "diff": diff and diff[:DIFF_LIMIT],
        "untracked": untracked.splitlines() if untracked else [],
    }


def _source_hash(package: str) -> str | None:
    """Return the hash of a package's Python files, or of a module's single file; None if one is unreadable."""
    module = sys.modules[package]
    folders = [Path(place) for place in getattr(module, "__path__", ())]
    files = sorted((path.relative_to(folder).as_posix(), path) for folder in folders for path in folder.rglob("*.py"))
    if not folders and (own := getattr(module, "__file__", None)):
        files = [(Path(own).name, Path(own))]
    try:
        return _hash(files) if files else None
    except OSError:  # for example, the package is in an archive
        return None


def _hash(files: Iterable[tuple[str, Path]]) -> str:
    """Return the hash of the names and contents of files."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode(errors="surrogateescape"))
        digest.update(path.read_bytes())
    return digest.hexdigest()


def changed_code(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the packages with another source than in a recorded environment, as far as both contain its hash."""
    before, after = (_sources(environment) for environment in (recorded, now))
    return [name for name in after if before.get(name, after[name]) != after[name]]


def recorded_changes(environment: Mapping[str, Any]) -> list[str]:
    """Return the packages that the environment records as changed when the run was resumed."""
    changed = _recorded_code(environment).get("changed")
    return [str(name) for name in changed] if isinstance(changed, list) else []


def _recorded_code(environment: Mapping[str, Any]) -> dict[str, Any]:
    code = environment.get("code")
    return code if isinstance(code, dict) else {}


def _sources(environment: Mapping[str, Any]) -> dict[str, Any]:
    code = _recorded_code(environment)
    imported = code.get("imported")
    own = {"zfnet": code["source_sha256"]} if "source_sha256" in code else {}
    return own | (imported if isinstance(imported, dict) else {})


def _git(*arguments: str) -> str | None:
    """Return the output of git for this project; None if there is no repository or git fails."""
    if not (ROOT / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        output = subprocess.run(command, capture_output=True, timeout=20, check=True).stdout
        return output.decode(errors="replace")  # a file in the diff can contain any bytes
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_info() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo; empty if there is no such file."""
    values: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    return values


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _read("/proc/driver/nvidia/version").partition("\n")[0] or None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
