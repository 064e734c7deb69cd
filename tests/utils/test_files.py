"""Files that are opened in folders of others: regular ones, no links, written whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spice_trainer.utils.files import make_folder, open_regular, read_regular, replace_file


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert read_regular(path) == b"mine"
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for name, said in (("link", "is a link"), ("dangling", "is a link"), ("fifo", "is no regular file")):
        with pytest.raises(OSError, match=said):
            read_regular(tmp_path / name)
        with pytest.raises(OSError, match="is a link|is no regular file"):
            open_regular(tmp_path / name, os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="is no regular file"):
        read_regular(tmp_path)
    with pytest.raises(OSError, match="is no regular file"):
        read_regular("/dev/null")
    assert not (tmp_path / "nowhere").exists()


def test_folders_are_no_links(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="is a link"):
        make_folder(tmp_path / "link")


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file").symlink_to(tmp_path / "victim")
    replace_file(tmp_path / "file", "new é")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new é" and (tmp_path / "victim").read_text() == "mine"

    def failing() -> object:
        yield b"half"
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        replace_file(tmp_path / "file", failing())  # type: ignore[arg-type]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new é"
    assert sorted(os.listdir(tmp_path)) == ["file", "victim"]
