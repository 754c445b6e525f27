"""Which code and which library versions computed something: part of the key of every cache and resume point.

The code is a module with every module of this library that it imports, found by reading their source, so there is no
list to keep. What cannot change a result (errors, trackers, the command line) does not count. The stages' `deps` in
dvc.yaml are held to the same rule by tests/test_dependencies.py.
"""

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Modules and packages that say, keep or show what others compute.
NOT_COMPUTING = ("cli", "errors", "files", "params", "provenance", "tracking")
# Libraries whose next version may compute, decode or build something else.
LIBRARIES = ("numpy", "open_clip_torch", "pillow", "scipy", "timm", "torch", "torchvision", "transformers")


def _file(module: str) -> Path | None:
    """The source of a module or of a package's face; None for what is neither."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _imported(module: str, package: str) -> Iterator[str]:
    """The modules of `package` that a module names in its imports, in functions too."""
    file = _file(module)
    assert file is not None
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            assert node.module is not None
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name for name in below if _file(name)]
            # `from package import module` needs the face only for names that are no modules.
            yield from found if len(found) == len(below) else [*found, node.module]


@cache
def modules_of(module: str) -> tuple[str, ...]:
    """`module` and every module of modelstock that computes for it, sorted: all imports, followed to their end."""
    found, todo = {module}, [module]
    while todo:
        for name in _imported(todo.pop(), "modelstock"):
            if name not in found and name.split(".")[1:2] != [] and name.split(".")[1] not in NOT_COMPUTING:
                found.add(name)
                todo.append(name)
    return tuple(sorted(found))


def files_of(module: str) -> list[Path]:
    """The source files of `modules_of`."""
    return [file for name in modules_of(module) if (file := _file(name)) is not None]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def provenance(module: str) -> dict[str, str]:
    """What computed a result of `module`: the sha256 of its code, and the version of every library that may matter."""
    digest = hashlib.sha256()
    for name, file in zip(modules_of(module), files_of(module), strict=True):
        digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return {"code": digest.hexdigest(), **{library: _version(library) for library in LIBRARIES}}


def key_of(module: str, *facts: Mapping[str, Any]) -> str:
    """24 hexadecimal digits that name a result of `module` from these facts (JSON): other code, another key."""
    text = json.dumps([provenance(module), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
