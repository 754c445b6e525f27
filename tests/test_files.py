"""Files are whole or absent, also where the disk is full."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from modelstock.errors import RoomError
from modelstock.files import atomic_path, write_json


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A limit of file sizes: the system then refuses writes much as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(300_000)),
    "safetensors": lambda path: save_file({"a": np.zeros(300_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(300_000), path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_for_which_there_is_no_room_is_one_line_that_names_the_folder_and_leaves_what_was_there(
    tmp_path, writer
):
    path = tmp_path / "weights"
    path.write_bytes(b"before")
    expected = r"got .*bytes free; expected room for it; make room"
    with pytest.raises(RoomError, match=expected) as caught, no_file_above(100_000), atomic_path(path) as temporary:
        WRITERS[writer](temporary)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]
    assert path.read_bytes() == b"before"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_the_file_is_flushed_counts_as_well(tmp_path, monkeypatch, code):
    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RoomError, match=f"got {os.strerror(code)}, 12 bytes written of a file, "):
        write_json(tmp_path / "a.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_a_write_stay_what_they_are(tmp_path):
    with pytest.raises(PermissionError), atomic_path(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")
