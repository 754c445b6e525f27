"""The manifest of a split: what its shards hold, what its labels stand for, and what identifies it.

`manifest.json` beside the shards holds benchmark, role, label names, shards with counts and sha256, and `label_groups`,
which lists for each label the head's classes that stand for it. One rule then scores every set: the logit of a label is
the maximum over its group. Full sets have groups of one, subsets name only some classes, ObjectNet maps several to one.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelstock.damage import cure_of
from modelstock.errors import DataError
from modelstock.files import dump_json, sha256_of, write_json

FILE_NAME = "manifest.json"
SHARD_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar"


class Shard(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=f"^{SHARD_NAME}$")
    count: int = Field(ge=1)
    sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds.

    `root`: the folder of the shards, where it is not the manifest's own (shards that are used in place). `border`:
    pixels to cut off each side of every image before anything else. `unreadable`: images of the source that were left
    out because they cannot be read. `left_out`: what else of the source is not here, counted. `notices`: whatever is
    unusual about the images, a line each; see modelstock.notices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    benchmark: str
    role: str
    labels: list[str]
    label_groups: list[Annotated[list[int], Field(min_length=1)]]
    classes: list[str]
    count: int
    shards: list[Shard]
    sha256: str
    root: str | None = None
    border: int = Field(default=0, ge=0)
    unreadable: list[str] = []
    left_out: dict[str, int] = {}
    notices: list[str] = []

    def paths(self, folder: Path) -> list[Path]:
        """The shards' files; `folder` is the manifest's."""
        root = folder if self.root is None else Path(self.root)
        return [root / shard.name for shard in self.shards]


def make_manifest(
    *,
    benchmark: str,
    role: str,
    labels: Sequence[str],
    label_groups: Sequence[Sequence[int]],
    classes: Sequence[str],
    shards: Sequence[Shard],
    border: int = 0,
    root: str | None = None,
    unreadable: Sequence[str] = (),
    left_out: Mapping[str, int] | None = None,
    notices: Sequence[str] = (),
) -> Manifest:
    """A manifest with its identity: a hash of what is scored, and not of where it is or what is missing from it."""
    facts: dict[str, Any] = {
        "benchmark": benchmark,
        "role": role,
        "labels": list(labels),
        "label_groups": [list(group) for group in label_groups],
        "classes": list(classes),
        "count": sum(shard.count for shard in shards),
        "shards": [shard.model_dump() for shard in shards],
        **({"border": border} if border else {}),
    }
    return Manifest(
        **facts,
        sha256=_sha256(facts),
        root=root,
        unreadable=list(unreadable),
        left_out=dict(left_out or {}),
        notices=list(notices),
    )


def _sha256(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(facts).encode()).hexdigest()


def _check_identity(path: Path, manifest: Manifest) -> None:
    """Raise DataError unless a manifest has the sha256 of what it says: caches and results go by it."""
    names = {"benchmark", "role", "labels", "label_groups", "classes", "count", "shards"}
    if _sha256(manifest.model_dump(include=names | ({"border"} if manifest.border else set()))) != manifest.sha256:
        raise DataError(
            path,
            got="a manifest that was changed after it was written",
            expected=f"what has the sha256 {manifest.sha256[:12]}",
            cure=cure_of(path, "run the stage prepare again for this split"),
        )


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest; `left_out` and `notices` only where there are some."""
    empty = {name for name in ("left_out", "notices") if not getattr(manifest, name)}
    write_json(folder / FILE_NAME, manifest.model_dump(exclude=empty))


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest; its shards are not looked at.

    Raises:
        DataError: no manifest, one that is not valid, or one that was changed.
    """
    path = folder / FILE_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            path, got=error.strerror, expected="a manifest", cure="run the stage prepare for this split"
        ) from error
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise DataError(path, got=text, expected="a manifest of shards", cure="run the stage prepare again") from None
    _check_identity(path, manifest)
    return manifest


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Hash every shard.

    Raises:
        DataError: a shard that is missing or does not have its sha256.
    """
    files = manifest.paths(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing runs beside Python
        digests = list(threads.map(lambda file: sha256_of(file) if file.is_file() else None, files))
    cure = "run the stage prepare again" + ("" if manifest.root else ", or copy the shard again")
    for shard, file, digest in zip(manifest.shards, files, digests, strict=True):
        if digest != shard.sha256:
            raise DataError(
                file,
                got=f"sha256 {digest[:12]} of {file.stat().st_size} bytes" if digest else "no such file",
                expected=f"sha256 {shard.sha256[:12]} with {shard.count} examples",
                cure=cure,
            )
