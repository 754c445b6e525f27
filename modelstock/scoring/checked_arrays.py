"""Arrays and facts in one safetensors file that cannot change unnoticed: its metadata hold the sha256 of both."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from modelstock.files import atomic_path

Arrays = Mapping[str, NDArray[Any]]


def write_checked(path: Path, arrays: Arrays, facts: Mapping[str, Any]) -> None:
    """Write arrays and facts (JSON), whole or not at all; the bytes repeat."""
    arrays = {
        name: np.ascontiguousarray(array) for name, array in arrays.items()
    }  # the library takes memory as it lies
    metadata = {"modelstock": json.dumps({**facts, "sha256": _sha256(arrays, facts)}, sort_keys=True)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(arrays, metadata=metadata))


def read_checked(path: Path, names: Sequence[str]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of these names, and the facts.

    Raises:
        OSError: a file that is not there or cannot be read.
        ValueError: one that is not what was written, with what is wrong.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["modelstock"])
            arrays = {name: file.get_tensor(name) for name in names}
            expected = facts.pop("sha256")
    except FileNotFoundError:
        raise
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if _sha256(arrays, facts) != expected:
        raise ValueError("values that do not have the sha256 they were written with")
    return arrays, facts


def _sha256(arrays: Arrays, facts: Mapping[str, Any]) -> str:
    """Of facts, and of names, dtypes, shapes and values."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name} {array.dtype.str} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
