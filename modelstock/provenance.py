"""Which code and which library versions computed something: part of the key of every cache and resume point.

The code of a module is that module with every other one that it imports, followed to the end by reading their source,
so there is no list to keep; a file of data beside a module that has its name (`published.yaml`) belongs to it. What
cannot change a result does not count: errors, trackers, the command line, and the packages' faces, which only pass
names on. The stages' `deps` in dvc.yaml are held to the same rule by tests/test_dependencies.py.
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
PACKAGES = ("modelstock", "stages")
# Modules and packages of modelstock that report, keep or show what others compute.
NOT_COMPUTING = (
    "cli",
    "damage",
    "errors",
    "files",
    "notices",
    "params",
    "progress",
    "provenance",
    "stopping",
    "tracking",
    "workers",
)
# Libraries whose next version may compute, decode or build something else.
LIBRARIES = (
    "ftfy",
    "numpy",
    "open_clip_torch",
    "pillow",
    "scipy",
    "timm",
    "tokenizers",
    "torch",
    "torchvision",
    "transformers",
)


def _file(module: str) -> Path | None:
    """The source of a module or of a package's face; None for what is neither."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _counts(module: str) -> bool:
    parts = module.split(".")
    return parts[0] in PACKAGES and not (parts[0] == "modelstock" and parts[1:2] and parts[1] in NOT_COMPUTING)


def _imports(tree: ast.AST, module: str, *, face: bool) -> Iterator[str]:
    """What a module's source imports, with full names, in functions too."""
    package = module if face else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                below = f"{origin}.{alias.name}"
                # Either a module of the package `origin`, or a name that the module or face `origin` defines.
                yield below if _file(below) else origin


@cache
def _read(module: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a module, its source first, and the modules that it imports."""
    source = _file(module)
    if source is None:
        return (), ()
    tree = ast.parse(source.read_bytes())
    data = sorted(p for p in source.parent.glob(f"{source.stem}.*") if p.suffix not in (".py", ".pyc"))
    face = source.name == "__init__.py"
    return (source, *data), tuple(sorted(set(_imports(tree, module, face=face))))


@cache
def modules_of(module: str) -> tuple[str, ...]:
    """`module` and every module of ours that computes for it, sorted: all imports, followed to their end."""
    reached, todo = {module}, [module]
    while todo:
        for name in _read(todo.pop())[1]:
            if name not in reached and _counts(name) and _file(name):
                reached.add(name)
                todo.append(name)
    return tuple(sorted(name for name in reached if _read(name)[0] and _read(name)[0][0].name != "__init__.py"))


def files_of(module: str) -> list[Path]:
    """The files of `modules_of`: their sources, and the data beside them."""
    return [file for name in modules_of(module) for file in _read(name)[0]]


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def provenance(module: str) -> dict[str, str]:
    """What computes a result of `module`: the sha256 of its code, and the version of every library that may matter."""
    digest = hashlib.sha256()
    for file in files_of(module):
        digest.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return {"code": digest.hexdigest(), **{library: _version(library) for library in LIBRARIES}}


def key_of(module: str, *facts: Mapping[str, Any]) -> str:
    """24 hexadecimal digits that name a result of `module` from these facts (JSON): other code, another key."""
    text = json.dumps([provenance(module), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]
