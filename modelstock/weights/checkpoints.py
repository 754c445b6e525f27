"""The one reader of checkpoints: safetensors files and folders, sharded ones, and torch's own, piece by piece.

A tensor is a place in a file until a slice of it is asked for. torch is imported only to open its pickles, with
`weights_only=True`, so nothing in them runs.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.errors import WeightsError
from modelstock.weights.format import broken_file, parse_header, parse_meta
from modelstock.weights.tensors import STORED, Array, Checkpoint, StoredTensor, reader_of

# A folder's weights: the first of these that it holds.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "weights.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


class _File:
    """A file read at any place, by several threads at once: kept open, or opened for each read.

    Of files that are not kept open there may be any number; that they are still the same is checked.
    """

    def __init__(self, path: Path, *, keep_open: bool) -> None:
        self._path, self._descriptor = path, -1
        descriptor = os.open(path, os.O_RDONLY)
        self._state = self._state_of(descriptor)
        if keep_open:
            self._descriptor = descriptor
        else:
            os.close(descriptor)

    def read(self, offset: int, into: NDArray[np.uint8]) -> None:
        """Fill `into` with the bytes from `offset` on."""
        if self._descriptor >= 0:
            self._read(self._descriptor, offset, into)
            return
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            if self._state_of(descriptor) != self._state:
                raise broken_file(self._path, "a file that was replaced while it was in use", cure="start again")
            self._read(descriptor, offset, into)
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, offset: int, into: NDArray[np.uint8]) -> None:
        # Read rather than mapped: pages of a map count as this process's memory until the system takes them away.
        while into.size:
            count = os.preadv(descriptor, [into.data], offset)
            if not count:
                raise broken_file(self._path, "a file that became shorter while it was read")
            offset, into = offset + count, into[count:]

    @staticmethod
    def _state_of(descriptor: int) -> tuple[int, int, int, int]:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def open_safetensors(path: Path, *, keep_open: bool = True) -> Checkpoint:
    """Open a safetensors file. `keep_open`: as long as its tensors are used; else each read opens it.

    Raises:
        WeightsError: a truncated or foreign file.
    """
    header, offset = parse_header(path)
    meta = parse_meta(path, header)
    file = _File(path, keep_open=keep_open)

    def entry(described: Mapping[str, Any]) -> StoredTensor:
        stored = STORED[described["dtype"]]
        begin = offset + described["data_offsets"][0]

        def read(start: int, stop: int, scratch: NDArray[np.uint8] | None = None) -> Array:
            size = (stop - start) * stored.itemsize
            into = np.empty(size, np.uint8) if scratch is None else scratch[:size]
            file.read(begin + start * stored.itemsize, into)
            return into.view(stored)

        return StoredTensor(described["dtype"], tuple(described["shape"]), read)

    tensors = {name: entry(described) for name, described in header.items() if name != "__metadata__"}
    return Checkpoint(tensors, meta, str(path))


def _sharded(index: Path) -> Checkpoint:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in mapping.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            index, got=f"{type(error).__name__}: {error}", expected="an index with a weight_map", cure="copy it again"
        ) from error
    parts: dict[str, Checkpoint] = {}
    tensors = {}
    for name, file in sorted(wanted.items()):
        if Path(file).name != file or file.endswith(".json") or not (index.parent / file).is_file():
            raise WeightsError(index, got=f"shard {file!r}", expected="a file beside the index", cure="copy it again")
        if file not in parts:
            parts[file] = open_checkpoint(index.parent / file)
        if name not in parts[file].tensors:
            raise WeightsError(
                index.parent / file, got=f"no tensor {name}", expected="what the index says", cure="copy it again"
            )
        tensors[name] = parts[file].tensors[name]
    return Checkpoint(tensors, {}, str(index))


def _pickled(path: Path) -> Checkpoint:
    import pickle

    import torch

    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(
            path,
            got=f"a file torch does not open as plain tensors ({' '.join(str(error).split())[:160]})",
            expected="a state dict of tensors; nothing in it is executed",
            cure="where you trust it, load it and torch.save(model.state_dict(), ...) again",
        ) from error
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise WeightsError(
            path,
            got=f"a {type(loaded).__name__} that holds more than tensors",
            expected="a state dict",
            cure="torch.save(model.state_dict(), ...) again",
        )
    stripped = "module." if loaded and all(name.startswith("module.") for name in loaded) else ""
    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }

    def entry(name: str, tensor: torch.Tensor) -> StoredTensor:
        if tensor.dtype not in names:
            raise WeightsError(
                f"{path}, tensor {name}", got=str(tensor.dtype), expected=", ".join(STORED), cure="convert it first"
            )
        flat = tensor.detach().contiguous().reshape(-1)
        array = flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()
        return StoredTensor(names[tensor.dtype], tuple(tensor.shape), reader_of(array))

    return Checkpoint({n.removeprefix(stripped): entry(n, t) for n, t in loaded.items()}, {}, str(path))


def weights_in(folder: Path, names: Sequence[str] = WEIGHT_FILES) -> Path:
    """The file of a folder that holds a model's weights: the first of `names` that is there, or its one safetensors.

    Raises:
        WeightsError: there is none, or several without an index.
    """
    named = [folder / name for name in names if (folder / name).is_file()]
    alone = sorted(folder.glob("*.safetensors"))
    if not named and len(alone) != 1:
        raise WeightsError(
            folder,
            got=f"a folder without weights, or with {len(alone)} safetensors files and no index",
            expected="one of " + ", ".join(names),
            cure="name the file",
        )
    return (named or alone)[0]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, an index of shards, a folder that holds one of these, or torch's state dict.

    Raises:
        WeightsError: a missing, empty, truncated or foreign file, a folder without weights, a pickle of more than
            tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise WeightsError(path, got="no such file", expected="a checkpoint", cure="check the path")
    if path.suffix == ".json":
        return _sharded(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise WeightsError(path, got=error.strerror, expected="a readable file", cure="check its mode") from error
    if path.suffix != ".safetensors" and start[:1] in (b"\x80", b"P"):
        return _pickled(path)
    return open_safetensors(path)
