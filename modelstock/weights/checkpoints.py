"""The one reader of checkpoints: safetensors files and folders, sharded ones, and torch's own, piece by piece.

A tensor is a place in a file until a slice of it is asked for. torch is imported only to open its pickles, with
`weights_only=True`, so nothing in them runs.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.errors import WeightsError, few
from modelstock.notices import notice
from modelstock.weights.format import broken_file, once, parse_header, parse_meta
from modelstock.weights.tensors import STORED, Array, Checkpoint, StoredTensor, reader_of

# A folder's weights: the first of these that it holds. Downloaded repositories often hold other libraries' forms of the
# same weights too: open_clip's come first.
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors.index.json",
    "model.safetensors",
    "weights.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
# Where training scripts keep the model in what they save, and its running averages; the first that is there.
MODELS = ("state_dict", "model_state_dict", "model", "module")
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# What data parallelism, torch.compile, FSDP and activation checkpointing put into the names of tensors.
_PREFIXES = ("module.", "_orig_mod.")
_SEGMENTS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# How torch names the first object of a file that it would have to execute.
_OBJECT = re.compile(r"(?:GLOBAL|function|class|global:?) ([A-Za-z_][\w.]*\.\w+)")


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
    meta, checksum = parse_meta(path, header)
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
    return Checkpoint(tensors, meta, str(path), checksum)


def _sharded(index: Path) -> Checkpoint:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)["weight_map"]
        wanted = {str(name): str(file) for name, file in mapping.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            index, got=f"{type(error).__name__}: {error}", expected="an index with a weight_map", cure="copy it again"
        ) from error
    parts: dict[str, Checkpoint] = {}
    tensors = {}
    for name, file in sorted(wanted.items()):
        if Path(file).name != file or file.endswith(".json") or not (index.parent / file).is_file():
            raise WeightsError(index, got=f"shard {file!r}", expected="a file beside the index", cure="copy it again")
        if file not in parts:
            parts[file] = _as_stored(index.parent / file)
        if name not in parts[file].tensors:
            raise WeightsError(
                index.parent / file, got=f"no tensor {name}", expected="what the index says", cure="copy it again"
            )
        tensors[name] = parts[file].tensors[name]
    return Checkpoint(tensors, {}, str(index))


def _load_pickle(path: Path) -> Any:
    """What torch.load gives of a file; nothing in it is executed.

    Raises:
        WeightsError: a damaged file, or one with objects that are no tensors, which names the first of them.
    """
    import pickle

    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())
        foreign = _OBJECT.search(text)
        cause = f"an object {foreign[1]} in it" if foreign else text[:160]
        raise WeightsError(
            path,
            got=f"a file torch does not open as plain tensors ({cause})",
            expected="a state dict of tensors; nothing in it is executed",
            cure="where you trust it, load it with weights_only=False and torch.save(model.state_dict(), ...) again",
        ) from error


def _model_in(path: Path, loaded: Any) -> tuple[Mapping[str, Any], str]:
    """The state dict in what a training script saved, and the names of the entries that led there."""
    entries: list[str] = []
    while isinstance(loaded, Mapping):
        models = [key for key in MODELS if isinstance(loaded.get(key), Mapping)]
        averages = [key for key in AVERAGES if isinstance(loaded.get(key), Mapping)]
        if not models + averages:
            break
        taken, *others = models + averages
        if others or taken in averages:
            kind = "running average" if taken in averages else "model"
            left = f"; {', '.join(others)} left aside: to take it, save it in a file of its own" if others else ""
            notice(path, f"its entry {taken} is taken, a {kind}{left}")
        entries.append(taken)
        loaded = loaded[taken]
    if not isinstance(loaded, Mapping):
        raise _no_state_dict(path, f"a {type(loaded).__name__}")
    return loaded, ".".join(entries)


def _no_state_dict(path: Path, got: str) -> WeightsError:
    return WeightsError(
        path, got=got, expected="a state dict: tensors by name", cure="torch.save(model.state_dict(), ...) again"
    )


def _pickled(path: Path) -> Checkpoint:
    import torch

    loaded, entry = _model_in(path, _load_pickle(path))
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise _no_state_dict(path, f"{name!r}, a {type(value).__name__}, among tensors")
        if not isinstance(name, str):
            raise _no_state_dict(path, f"the {type(name).__name__} {name!r} as a name")
    return Checkpoint({n: _torch_tensor(path, n, t) for n, t in loaded.items()}, {}, str(path), taken_from=entry)


def _torch_tensor(path: Path, name: str, tensor: Any) -> StoredTensor:
    """A tensor of torch, as it lies in its file."""
    import torch

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
    problem = None
    if tensor.layout != torch.strided:
        problem = f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})"
    elif tensor.is_meta:
        problem = "a tensor on the device meta, without values"
    elif tensor.dtype not in names:
        problem = str(tensor.dtype)
    if problem is not None:
        cure = "convert it first, or leave it out of the file"
        raise WeightsError(f"{path}, tensor {name}", got=problem, expected=f"one of {', '.join(STORED)}", cure=cure)
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    array = flat.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else flat.numpy()
    return StoredTensor(names[tensor.dtype], tuple(tensor.shape), reader_of(array))


def _plain_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without what wrappers around a model, or around its parts, put into the names of its tensors.

    Raises:
        WeightsError: two tensors would have one name.
    """
    names = {name: name for name in checkpoint.tensors}
    prefix = ""
    while further := next((p for p in _PREFIXES if names and all(n.startswith(p) for n in names.values())), ""):
        prefix += further
        names = {name: plain.removeprefix(further) for name, plain in names.items()}
    names = {name: _SEGMENTS.sub("", plain) for name, plain in names.items()}
    if len(set(names.values())) < len(names):
        twice, _ = Counter(names.values()).most_common(1)[0]
        both = [name for name, plain in names.items() if plain == twice]
        cure = "save the model without its wrappers"
        raise WeightsError(checkpoint.source, got=f"both {' and '.join(both)}", expected="one of them", cure=cure)
    if all(name == plain for name, plain in names.items()):
        return checkpoint
    tensors = {plain: checkpoint.tensors[name] for name, plain in names.items()}
    taken_from = ".".join(filter(None, [checkpoint.taken_from, prefix.rstrip(".")])) or "wrapped parts"
    return replace(checkpoint, tensors=tensors, taken_from=taken_from)


def weights_in(folder: Path) -> Path:
    """The file of a folder that holds a model's weights: the first of WEIGHT_FILES, or its one safetensors file.

    Raises:
        WeightsError: there is none, or several without an index.
    """
    named = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    alone = sorted(folder.glob("*.safetensors"))
    if not named and len(alone) != 1:
        raise WeightsError(
            folder,
            got=f"a folder without weights, or with {len(alone)} safetensors files and no index",
            expected="one of " + ", ".join(WEIGHT_FILES),
            cure="name the file",
        )
    taken, *others = named or alone
    if others:
        notice(folder, f"{taken.name} is taken of it; {few([path.name for path in others])} left aside")
    return taken


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a safetensors file, an index of shards, a folder that holds one of these, or torch's state dict.

    What training scripts and wrappers put around a model is taken off: see `MODELS` and `_plain_names`. Which of
    several models or files was taken is a notice.

    Raises:
        WeightsError: a missing, empty, truncated or foreign file, a folder without weights, a pickle of more than
            tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise WeightsError(path, got="no such file", expected="a checkpoint", cure="check the path")
    return _plain_names(_as_stored(path))


def _as_stored(path: Path) -> Checkpoint:
    """A file's checkpoint, by its content."""
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
