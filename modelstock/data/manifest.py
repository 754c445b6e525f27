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
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from modelstock.damage import cure_of
from modelstock.errors import DataError, few
from modelstock.files import NAME, dump_json, on_this_machine, sha256_of, write_json

FILE_NAME = "manifest.json"
_LARGEST = 256 << 20  # bytes of a manifest; ImageNet's has less than one
_AGAIN = "run the stage prepare again"
Modality = Literal["image", "text"]
SHARD_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar"


class Shard(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=f"^{SHARD_NAME}$")
    count: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """What a folder of shards holds.

    `root`: the folder of the shards, where it is not the manifest's own (shards that are used in place), on the machine
    that prepared them; see modelstock.files.on_this_machine. `border`: pixels to remove from each side of every image
    before anything else. `unreadable`: images of the source that were left out because they cannot be read. `left_out`:
    what else of the source is not here, counted. `notices`: whatever is unusual about the images, a line each; see
    modelstock.notices. `modality`: what the examples are. `rules`: how texts got their labels, and which were left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    benchmark: str = Field(pattern=f"^{NAME}$")
    role: Literal["train", "held-out", "held-out-shift", "in-distribution", "shift", "none"]
    labels: list[str] = Field(min_length=1)
    label_groups: list[Annotated[list[int], Field(min_length=1)]]
    classes: list[str] = Field(min_length=1)
    count: int = Field(ge=1)
    shards: list[Shard] = Field(min_length=1)
    sha256: str
    root: str | None = None
    border: int = Field(default=0, ge=0)
    unreadable: list[str] = []
    left_out: dict[str, int] = {}
    notices: list[str] = []
    modality: Modality = "image"
    rules: dict[str, str] = {}

    @field_validator("root")
    @classmethod
    def _local(cls, root: str | None) -> str | None:
        # Readers of webdataset run what follows `pipe:`, and open URLs; shards here are files of a folder.
        if root is not None and (not Path(root).is_absolute() or "\0" in root):
            raise ValueError("the absolute path of a folder")
        return root

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [shard.name for shard in self.shards]
        problems = {
            "a label that comes twice": len(set(self.labels)) < len(self.labels),
            "a shard that comes twice": len(set(names)) < len(names),
            f"{len(self.label_groups)} label_groups for {len(self.labels)} labels": len(self.label_groups)
            != len(self.labels),
            f"label_groups outside 0 to {len(self.classes) - 1}": any(
                not 0 <= place < len(self.classes) for group in self.label_groups for place in group
            ),
            "a class twice in one of label_groups": any(len(set(group)) < len(group) for group in self.label_groups),
            f"count {self.count} for shards of {sum(s.count for s in self.shards)}": self.count
            != sum(shard.count for shard in self.shards),
        }
        if wrong := [text for text, is_wrong in problems.items() if is_wrong]:
            raise ValueError(", ".join(wrong))
        return self

    def paths(self, folder: Path) -> list[Path]:
        """The shards' files on this machine; `folder` is the manifest's."""
        root = folder if self.root is None else on_this_machine(self.root)
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
    modality: Modality = "image",
    rules: Mapping[str, str] | None = None,
) -> Manifest:
    """A manifest with its identity: a hash of what is scored, and not of where it is or what is missing from it.

    Raises:
        DataError: parts that do not belong together, such as a label that comes twice.
    """
    facts: dict[str, Any] = {
        "benchmark": benchmark,
        "role": role,
        "labels": list(labels),
        "label_groups": [list(group) for group in label_groups],
        "classes": list(classes),
        "count": sum(shard.count for shard in shards),
        "shards": [shard.model_dump() for shard in shards],
        "border": border,
        "modality": modality,
    }
    about: dict[str, Any] = {"unreadable": list(unreadable), "left_out": left_out or {}, "notices": list(notices)}
    about["rules"] = rules or {}
    try:
        return Manifest(**facts, sha256=_identity(facts), root=root, **about)
    except ValidationError as error:
        cure = "correct the split's labels, classes or name"
        raise DataError(benchmark, got=_problems(error), expected="a split", cure=cure) from None


# What a manifest's identity is a hash of, and of these what does not count where it is as usual.
_IDENTIFYING = ("benchmark", "role", "labels", "label_groups", "classes", "count", "shards", "border", "modality")
_USUAL = {"border": 0, "modality": "image"}


def _identity(facts: Mapping[str, Any]) -> str:
    usual = {name for name, value in _USUAL.items() if facts.get(name, value) == value}
    counted = {name: facts[name] for name in _IDENTIFYING if name not in usual}
    return hashlib.sha256(dump_json(counted).encode()).hexdigest()


def _problems(error: ValidationError) -> str:
    found = [(".".join(map(str, p["loc"])), p["msg"].removeprefix("Value error, ")) for p in error.errors()]
    return few([f"{place}: {text}" if place else text for place, text in found])


def _check_identity(path: Path, manifest: Manifest) -> None:
    """Raise DataError unless a manifest has the sha256 of what it says: caches and results go by it."""
    if _identity(manifest.model_dump()) != manifest.sha256:
        raise DataError(
            path,
            got="a manifest that was changed after it was written",
            expected=f"what has the sha256 {manifest.sha256[:12]}",
            cure=cure_of(path, f"{_AGAIN} for this split"),
        )


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest; `left_out`, `notices` and `rules` only where there are some, `modality` of texts."""
    empty = {name for name in ("left_out", "notices", "rules") if not getattr(manifest, name)}
    empty |= {"modality"} if manifest.modality == "image" else set()
    write_json(folder / FILE_NAME, manifest.model_dump(exclude=empty))


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest; its shards are not looked at.

    Raises:
        DataError: no manifest, or one that is not valid, or was changed since it was written.
    """
    path = folder / FILE_NAME
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(path, got=f"{path.stat().st_size} bytes", expected="a manifest of shards", cure=_AGAIN)
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            path, got=error.strerror, expected="a manifest", cure="run the stage prepare for this split"
        ) from error
    except ValidationError as error:
        raise DataError(path, got=_problems(error), expected="a manifest of shards", cure=_AGAIN) from None
    _check_identity(path, manifest)
    return manifest


def _digest(file: Path) -> str | None:
    try:
        return sha256_of(file) if file.is_file() else None
    except OSError as error:
        raise DataError(file, got=error.strerror, expected="a shard that can be read", cure="correct that") from error


def verify_shards(folder: Path, manifest: Manifest) -> None:
    """Hash every shard.

    Raises:
        DataError: a shard that is missing or does not have its sha256.
    """
    files = manifest.paths(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing runs beside Python
        digests = list(threads.map(_digest, files))
    cure = _AGAIN + (
        ", or say in MODELSTOCK_PATHS where the folder is on this machine"
        if manifest.root
        else ", or copy the shard again"
    )
    for shard, file, digest in zip(manifest.shards, files, digests, strict=True):
        if digest != shard.sha256:
            raise DataError(
                file,
                got=f"sha256 {digest[:12]} of {file.stat().st_size} bytes" if digest else "no such file",
                expected=f"sha256 {shard.sha256[:12]} with {shard.count} examples",
                cure=cure_of(file, cure),
            )
