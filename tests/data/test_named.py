"""What `images=[…]` names."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from zfnet.data.named import find_images


def names(items: list[str]) -> list[str]:
    return [image.name for image in find_images(items)[0]]


def test_files_folders_patterns_and_addresses(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "photos/z.jpg", "photos/deep/y.PNG", "odd[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)
    Path("photos/notes.txt").write_text("no image")
    Path("photos/.hidden.png").write_bytes(Path("a.png").read_bytes())
    assert names(["b.png", "a.png"]) == ["b.png", "a.png"]
    assert names(["photos"]) == names(["photos/"]) == ["photos/deep/y.PNG", "photos/z.jpg"]
    assert names(["?.png"]) == ["a.png", "b.png"]
    assert names(["**/*.jpg"]) == ["photos/z.jpg"]
    assert names(["odd[1].png"]) == ["odd[1].png"]  # a name before it is a pattern
    assert names(["a.png", "*.png"]) == ["a.png", "b.png", "odd[1].png"]  # each once
    assert names(["https://example.org/x?y=*"]) == ["https://example.org/x?y=*"]


def test_what_names_no_image_is_reported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    os.mkfifo("pipe")
    images, problems = find_images(["empty", "none.png", "*.jpg", "pipe"])
    assert images == []
    assert problems == {
        "empty": "holds no image files",
        "none.png": "there is no such file",
        "*.jpg": "matches no file",
        "pipe": "is not a regular file",
    }
