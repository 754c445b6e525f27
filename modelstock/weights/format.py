"""The safetensors format: headers read with suspicion, and files whose bytes are equal where the tensors are.

Written here, not by the library `safetensors`, which writes two or more metadata keys in random order.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstock.errors import WeightsError
from modelstock.files import atomic_path
from modelstock.weights.metadata import problem_of
from modelstock.weights.tensors import STORED, Array, checksum_of, dump_meta, identity_of, stored_array

CHECKSUM = "modelstock.checksum"  # beside our metadata
_MOST_HEADER = 100_000_000


def broken_file(path: Path, got: object, cure: str = "make or copy the file again") -> WeightsError:
    """The error for a file that is not what the format asks for."""
    return WeightsError(path, got=got, expected="a whole safetensors file", cure=cure)


def _header_bytes(path: Path, size: int) -> bytes:
    """The bytes of JSON at the beginning of a file."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise broken_file(path, f"{size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _MOST_HEADER):
            if start[:4] == b"PK\x03\x04":
                raise broken_file(path, "a zip archive, as torch.save writes", cure="rename it to .pt")
            raise broken_file(path, f"a header of {length} bytes in a file of {size}")
        return file.read(length)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once each: of two, readers take now the one and now the other.

    Raises:
        ValueError: a key is there twice.
    """
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"the key {twice!r} twice")
    return entries


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Where a header says that a tensor's data begin and end."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise broken_file(path, f"tensor {name} described as {str(entry)[:80]}") from error
    if dtype not in STORED:
        raise WeightsError(
            f"{path}, tensor {name}", got=f"dtype {dtype!r}", expected=", ".join(STORED), cure="convert it first"
        )
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise broken_file(path, f"tensor {name} with shape {shape} at {begin}:{end}")
    if end - begin != math.prod(shape) * STORED[dtype].itemsize:
        raise broken_file(path, f"tensor {name} of {dtype}{shape} in {end - begin} bytes")
    return begin, end, name


def parse_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors header, checked entry by entry, and the offset at which the data begin.

    Raises:
        WeightsError: anything that the format forbids: a length beyond the file, bad JSON, unknown dtypes, offsets
            that do not fit the shape, overlap, leave gaps or end beyond the file.
    """
    size = path.stat().st_size
    raw = _header_bytes(path, size)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise broken_file(path, f"a header that is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken_file(path, f"a header that is a {type(header).__name__}")
    spans = sorted(_span(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise broken_file(path, f"tensor {name} at byte {begin}, after data that end at {position}")
        position = end
    if 8 + len(raw) + position != size:
        raise broken_file(path, f"{size} bytes where the header describes {8 + len(raw) + position}")
    return header, 8 + len(raw)


@dataclass(frozen=True)
class Layout:
    """A safetensors file before its tensors are written: its first bytes, where each tensor begins, its size."""

    start: bytes
    begins: Mapping[str, int]
    size: int


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], meta: Mapping[str, Any] | None, checksum: str | None = None
) -> Layout:
    """The file for tensors, name -> (stored dtype, shape), with our metadata and their checksum, or without any.

    `format: pt` tells other libraries that the names are those of a model of torch.
    """
    metadata = {"format": "pt"}
    if meta is not None:
        metadata["modelstock"] = dump_meta(meta)
    if checksum is not None:
        metadata[CHECKSUM] = checksum
    header: dict[str, Any] = {"__metadata__": metadata}
    position, begins = 0, {}
    # Larger dtypes first, so that every tensor is aligned, then by name.
    for name in sorted(tensors, key=lambda n: (-STORED[tensors[n][0]].itemsize, n)):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * STORED[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        begins[name] = position
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    start = struct.pack("<Q", len(raw)) + raw
    return Layout(start, {name: len(start) + begin for name, begin in begins.items()}, len(start) + position)


def write_arrays(path: Path, tensors: Mapping[str, Array], meta: Mapping[str, Any] | None = None) -> None:
    """Write arrays as one safetensors file with our metadata, or without any; whole or not at all.

    Raises:
        WeightsError: a dtype that the format has no name for.
    """
    stored = {name: stored_array(array, name) for name, array in sorted(tensors.items())}
    described = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    checksum = None if meta is None else checksum_of(identity_of(stored.items()), meta)
    layout = lay_out(described, meta, checksum)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(layout.start)
        for name in layout.begins:
            for values in stored[name].pieces():
                file.write(values.data)


def parse_meta(path: Path, header: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Our metadata in a file's header, and the checksum written with them; both empty in other libraries' files."""
    metadata = header.get("__metadata__", {})
    try:
        meta, checksum = json.loads(metadata.get("modelstock", "{}")), metadata.get(CHECKSUM)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise broken_file(path, f"metadata {str(metadata)[:80]}") from error
    problem = problem_of(meta)
    if problem is None and not isinstance(checksum, str | None):
        problem = f"a checksum that is a {type(checksum).__name__}"
    if problem is not None:
        raise broken_file(path, problem, cure="make it again; metadata of ours are written by nothing else")
    return meta, checksum
