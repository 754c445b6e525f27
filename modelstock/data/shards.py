"""webdataset shards whose bytes repeat, and the manifest that says what they hold.

A folder holds `000000.tar`, `000001.tar`, ... with one `<key>.cls` and one `<key>.png`, `.jpg` or `.webp` an example,
and `manifest.json`: benchmark, role, label names, shards with counts and sha256, and `label_groups`, which lists for
each label the head's classes that stand for it. One rule then scores every set: the logit of a label is the maximum
over its group. Full sets have groups of one, subsets name only some classes, ObjectNet maps several to one.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelstock.errors import DataError, WeightsError
from modelstock.files import atomic_path, dump_json, sha256_of, write_json
from modelstock.weights.weight_set import WeightSet, classes_sha256

# What an example's image may be called; a key is a member's name up to its first dot, as webdataset has it.
IMAGES = ("jpg", "jpeg", "png", "webp")
# Pillow reads more, and runs other programs for some of it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
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
    out because they cannot be read. `left_out`: what else of the source is not here, counted.
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

    def paths(self, folder: Path) -> list[Path]:
        """The shards' files; `folder` is the manifest's."""
        root = folder if self.root is None else Path(self.root)
        return [root / shard.name for shard in self.shards]


def decode(content: bytes, border: int = 0) -> Image.Image:
    """A file's picture in RGB, with `border` pixels cut off each side.

    Raises:
        ValueError: nothing is left within the border. Pillow raises much else for files that are damaged.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        width, height = image.size
        if min(width, height) <= 2 * border:
            raise ValueError(f"{width}x{height} pixels are all border")
        picture = image.convert("RGB")
    return picture.crop((border, border, width - border, height - border)) if border else picture


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # mtime 0, owner 0: the bytes depend on the content alone
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def write_shard(path: Path, examples: Iterable[tuple[int, int, str, bytes]]) -> Shard | None:
    """Write one tar file, whole or not at all, of (number, label, suffix, image file); None where there is none."""
    count = 0
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, label, suffix, content in examples:
                _add(tar, f"{number:08d}.cls", str(int(label)).encode())
                _add(tar, f"{number:08d}.{suffix}", content)
                count += 1
        digest = sha256_of(temporary)
    if not count:
        path.unlink()
        return None
    return Shard(name=path.name, count=count, sha256=digest)


def clear(folder: Path) -> None:
    """Make a folder ready for shards: a folder without a manifest is an unfinished one."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / "manifest.json", *folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9].tar")]:
        old.unlink(missing_ok=True)


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
    digest = hashlib.sha256(dump_json(facts).encode()).hexdigest()
    return Manifest(**facts, sha256=digest, root=root, unreadable=list(unreadable), left_out=dict(left_out or {}))


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a folder's manifest; `left_out` only where something is."""
    write_json(folder / "manifest.json", manifest.model_dump(exclude=None if manifest.left_out else {"left_out"}))


def write_shards(
    folder: Path,
    examples: Iterable[tuple[NDArray[np.uint8], int]],
    *,
    benchmark: str,
    role: str,
    labels: Sequence[str],
    label_groups: Sequence[Sequence[int]],
    classes: Sequence[str],
    shard_size: int,
) -> Manifest:
    """Write examples to shards and then the manifest; a folder without a manifest is an unfinished one."""
    clear(folder)
    numbered = ((n, label, "png", png(Image.fromarray(image))) for n, (image, label) in enumerate(examples))
    shards: list[Shard] = []
    while shard := write_shard(folder / f"{len(shards):06d}.tar", islice(numbered, shard_size)):
        shards.append(shard)
    manifest = make_manifest(
        benchmark=benchmark, role=role, labels=labels, label_groups=label_groups, classes=classes, shards=shards
    )
    save_manifest(folder, manifest)
    return manifest


def load_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest, and check that its shards are there and whole.

    Raises:
        DataError: no manifest, a bad one, or a shard that is missing or does not have its sha256.
    """
    path = folder / "manifest.json"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            path, got=error.strerror, expected="a manifest", cure="run the stage prepare for this split"
        ) from error
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise DataError(path, got=text, expected="a manifest of shards", cure="run the stage prepare again") from None
    files = manifest.paths(folder)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing runs beside Python
        found = list(threads.map(lambda file: sha256_of(file) if file.is_file() else "no such file", files))
    cure = "run the stage prepare again" + ("" if manifest.root else ", or copy the shard again")
    for shard, file, got in zip(manifest.shards, files, found, strict=True):
        if got != shard.sha256:
            raise DataError(
                file,
                got=got if got == "no such file" else f"sha256 {got[:12]} of {file.stat().st_size} bytes",
                expected=f"sha256 {shard.sha256[:12]} with {shard.count} examples",
                cure=cure,
            )
    return manifest


def check_classes(weights: WeightSet, manifest: Manifest, folder: Path) -> None:
    """Raise WeightsError unless the head's classes are those that the manifest's label groups point to."""
    expected = classes_sha256(manifest.classes)
    if weights.meta.get("classes_sha256") != expected:
        raise WeightsError(
            weights.source,
            got=f"a head for classes {str(weights.meta.get('classes_sha256'))[:12]}",
            expected=f"the {len(manifest.classes)} classes {expected[:12]} of {folder}",
            cure="evaluate it on data of its own classes",
        )


def read_batches(
    folder: Path, manifest: Manifest, *, batch_size: int
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """Decode every example once, in shard order: images (B, H, W, 3) uint8 of one size and labels (B,).

    Raises:
        DataError: an example without image or label, a label out of range, a count that is not the manifest's, or
            images of several sizes.
    """
    import webdataset

    urls = [str(path) for path in manifest.paths(folder)]
    # Each process reads everything: who trains on what is settled by rows, in modelstock/loading.py.
    stream = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=iter, empty_check=False)
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    shape: tuple[int, ...] | None = None
    seen = 0
    for sample in stream:
        content = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
        label = _label(sample.get("cls"))
        if content is None or not 0 <= label < len(manifest.labels):
            raise DataError(
                f"{folder}, example {sample['__key__']}",
                got=f"label {label}, {'an' if content is not None else 'no'} image",
                expected=f"an image and a label below {len(manifest.labels)}",
                cure="run the stage prepare again",
            )
        image = np.asarray(decode(content, manifest.border))
        shape = shape or image.shape
        if image.shape != shape:
            raise DataError(
                f"{folder}, example {sample['__key__']}",
                got=f"an image of {image.shape[1]}x{image.shape[0]} pixels after others of {shape[1]}x{shape[0]}",
                expected="images of one size, to keep them in memory",
                cure="set loading.in_memory: false",
            )
        images.append(image)
        labels.append(label)
        seen += 1
        if len(images) == batch_size:
            yield np.stack(images), np.array(labels, np.int64)
            images, labels = [], []
    if images:
        yield np.stack(images), np.array(labels, np.int64)
    if seen != manifest.count:
        raise DataError(
            folder, got=f"{seen} examples", expected=f"{manifest.count}", cure="run the stage prepare again"
        )


def _label(content: bytes | None) -> int:
    """The integer of a `.cls` file; -1 for none."""
    text = (content or b"").strip()
    return int(text) if text.isdigit() else -1


def example_places(folder: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each image's bytes are, in shard order: (shard, first byte, length) (N, 3), and the labels (N,).

    Only the tar files' heads and the labels are read.

    Raises:
        DataError: an example without image or label, a label out of range, or a count that is not the manifest's.
    """
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, (shard, path) in enumerate(zip(manifest.shards, manifest.paths(folder), strict=True)):
        images: dict[str, tuple[int, int, int]] = {}
        found: dict[str, int] = {}
        with tarfile.open(path) as tar:
            for entry in tar:
                folder_of, _, name = entry.name.rpartition("/")
                key, _, kind = name.partition(".")
                key = f"{folder_of}/{key}" if folder_of else key
                content = tar.extractfile(entry) if kind == "cls" else None
                if content is not None:
                    found[key] = _label(content.read())
                elif kind.lower() in IMAGES:
                    images[key] = (number, entry.offset_data, entry.size)
        bad = [
            key
            for key in images.keys() | found.keys()
            if key not in images or not 0 <= found.get(key, -1) < len(manifest.labels)
        ]
        if bad or len(images) != shard.count:
            raise DataError(
                path,
                got=f"{len(images)} images" + (f", {bad[0]} without image or valid label" if bad else ""),
                expected=f"{shard.count} with a label below {len(manifest.labels)} each",
                cure="run the stage prepare again",
            )
        places += images.values()
        labels += [found[key] for key in images]
    return np.array(places, np.int64).reshape(-1, 3), np.array(labels, np.int64)


def read_all(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], Manifest]:
    """Every image and label of a small split whose images are of one size, in memory.

    Raises:
        DataError: shards that are damaged, or images of several sizes.
    """
    manifest = load_manifest(folder)
    parts = list(read_batches(folder, manifest, batch_size=1000))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), manifest


def contact_sheet(path: Path, images: NDArray[np.uint8], *, columns: int = 12, zoom: int = 2) -> None:
    """A PNG that shows images (N, H, W, 3) side by side, so that a person can see the data."""
    columns = min(columns, len(images))
    count = len(images) // columns * columns
    rows = images[:count].reshape(-1, columns, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    enlarged = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(Image.fromarray(enlarged)))
