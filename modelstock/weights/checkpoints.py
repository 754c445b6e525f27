"""Checkpoints read piece by piece: safetensors files and folders, sharded ones, and torch's own, without loading them.

A tensor is a place in a file until a slice of it is asked for. safetensors are parsed here, in numpy alone; torch is
imported only to open its pickles, with `weights_only=True`, so nothing in them runs.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.errors import WeightsError
from modelstock.weights.tensors import STORED, Array, Checkpoint, StoredTensor, reader_of

_MOST_HEADER = 100_000_000


def _bad(path: Path, got: object, cure: str = "make or copy the file again") -> WeightsError:
    return WeightsError(path, got=got, expected="a whole safetensors file", cure=cure)


def parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header, checked entry by entry, and the offset at which the data begins.

    Raises:
        WeightsError: anything that the format forbids: a length beyond the file, bad JSON, unknown dtypes, offsets
            that do not fit the shape, overlap, leave gaps or end beyond the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _bad(path, f"{size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _MOST_HEADER):
            if start[:4] == b"PK\x03\x04":
                raise _bad(path, "a zip archive, as torch.save writes", cure="rename it to .pt")
            raise _bad(path, f"a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _bad(path, f"a header that is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(path, f"a header that is a {type(header).__name__}")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [*shape, begin, end]
        except (TypeError, KeyError, ValueError) as error:
            raise _bad(path, f"tensor {name} described as {str(entry)[:80]}") from error
        if dtype not in STORED:
            raise WeightsError(
                f"{path}, tensor {name}", got=f"dtype {dtype!r}", expected=", ".join(STORED), cure="convert it first"
            )
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise _bad(path, f"tensor {name} with shape {shape} at {begin}:{end}")
        if end - begin != math.prod(shape) * STORED[dtype].itemsize:
            raise _bad(path, f"tensor {name} of {dtype}{shape} in {end - begin} bytes")
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            raise _bad(path, f"tensor {name} at byte {begin}, after data that end at {place}")
        place = end
    if 8 + length + place != size:
        raise _bad(path, f"{size} bytes where the header describes {8 + length + place}")
    return header, 8 + length


class _File:
    """A file open for reading at any place, by several threads at once, until nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, os.open(path, os.O_RDONLY)

    def read(self, offset: int, into: NDArray[np.uint8]) -> None:
        # Read rather than mapped: pages of a map count as this process's memory until the system takes them away.
        while into.size:
            got = os.preadv(self._descriptor, [into.data], offset)
            if not got:
                raise _bad(self._path, "a file that was cut while it was read")
            offset, into = offset + got, into[got:]

    def __del__(self) -> None:
        os.close(self._descriptor)


def _safetensors(path: Path) -> Checkpoint:
    header, offset = parse_header(path)
    said = header.pop("__metadata__", None) or {}
    try:
        meta = json.loads(said.get("modelstock", "{}"))
    except (AttributeError, TypeError, ValueError) as error:
        raise _bad(path, f"metadata {str(said)[:80]}") from error
    file = _File(path)

    def entry(described: Mapping[str, Any]) -> StoredTensor:
        stored = STORED[described["dtype"]]
        begin = offset + described["data_offsets"][0]

        def read(start: int, stop: int, scratch: NDArray[np.uint8] | None = None) -> Array:
            size = (stop - start) * stored.itemsize
            into = np.empty(size, np.uint8) if scratch is None else scratch[:size]
            file.read(begin + start * stored.itemsize, into)
            return into.view(stored)

        return StoredTensor(described["dtype"], tuple(described["shape"]), read)

    return Checkpoint({name: entry(described) for name, described in header.items()}, meta, str(path))


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


_IN_FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "open_clip_model.safetensors",
    "weights.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, an index of shards, a folder that holds one of these, or torch's state dict.

    Raises:
        WeightsError: a missing, empty, truncated or foreign file, a folder without weights, a pickle of more than
            tensors.
    """
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
        alone = sorted(path.glob("*.safetensors"))
        if found is None and len(alone) == 1:
            found = alone[0]
        if found is None:
            raise WeightsError(
                path,
                got=f"a folder without weights, or with {len(alone)} safetensors files and no index",
                expected="one of " + ", ".join(_IN_FOLDERS),
                cure="name the file",
            )
        path = found
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
    return _safetensors(path)
