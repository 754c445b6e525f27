"""webdataset shards whose bytes repeat, and the manifest that says what they hold.

A folder holds `000000.tar`, `000001.tar`, ... with one `<key>.png` and one `<key>.cls` an example, and
`manifest.json`: benchmark, role, label names, shards with counts and sha256, and `label_groups`, which lists for each
label the head's classes that stand for it. One rule then scores every set: the logit of a label is the maximum over
its group. Full sets have groups of one, subsets name only some classes, ObjectNet maps several to one.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from modelstock.errors import DataError, WeightsError
from modelstock.files import atomic_path, dump_json, sha256_of, write_json
from modelstock.weights import WeightSet, classes_sha256


class Shard(BaseModel):
    """One tar file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar$")
    count: int = Field(ge=1)
    sha256: str


class Manifest(BaseModel):
    """What a folder of shards holds.

    `root`: the folder of the shards, where it is not the manifest's own (shards that are used in place). `border`:
    pixels to cut off each side of every image before anything else. `unreadable`: images of the source that were left
    out because they cannot be read.
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

    def paths(self, folder: Path) -> list[Path]:
        """The shards' files; `folder` is the manifest's."""
        root = folder if self.root is None else Path(self.root)
        return [root / shard.name for shard in self.shards]


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # mtime 0, owner 0: the bytes depend on the content alone
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


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
    folder.mkdir(parents=True, exist_ok=True)
    for old in [folder / "manifest.json", *folder.glob("*.tar")]:
        old.unlink(missing_ok=True)
    shards: list[Shard] = []
    stream, total = iter(examples), 0
    first = next(stream, None)
    while first is not None:
        name, count = f"{len(shards):06d}.tar", 0
        with (
            atomic_path(folder / name) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            while first is not None and count < shard_size:
                image, label = first
                _add(tar, f"{total:08d}.cls", str(int(label)).encode())
                _add(tar, f"{total:08d}.png", _png(image))
                count, total = count + 1, total + 1
                first = next(stream, None)
        shards.append(Shard(name=name, count=count, sha256=sha256_of(folder / name)))
    facts: dict[str, Any] = {
        "benchmark": benchmark,
        "role": role,
        "labels": list(labels),
        "label_groups": [list(group) for group in label_groups],
        "classes": list(classes),
        "count": total,
        "shards": [shard.model_dump() for shard in shards],
    }
    manifest = Manifest(**facts, sha256=hashlib.sha256(dump_json(facts).encode()).hexdigest())
    write_json(folder / "manifest.json", manifest.model_dump())
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
    for shard in manifest.shards:
        file = folder / shard.name
        got = sha256_of(file) if file.is_file() else "no such file"
        if got != shard.sha256:
            raise DataError(
                file,
                got=got if got == "no such file" else f"sha256 {got[:12]} of {file.stat().st_size} bytes",
                expected=f"sha256 {shard.sha256[:12]} with {shard.count} examples",
                cure="run the stage prepare again, or copy the shard again",
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
    """Decode every example once, in shard order: images (B, H, W, 3) uint8 and labels (B,).

    Raises:
        DataError: an example without image or label, a label out of range, or a count that is not the manifest's.
    """
    import webdataset

    urls = [str(folder / shard.name) for shard in manifest.shards]
    stream = webdataset.WebDataset(
        # Each process reads everything: who trains on what is settled by rows, in modelstock/loading.py.
        urls, shardshuffle=False, nodesplitter=iter, empty_check=False
    ).decode("rgb8")
    images: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    seen = 0
    for sample in stream:
        image, label = sample.get("png"), sample.get("cls")
        if image is None or label is None or not 0 <= label < len(manifest.labels):
            raise DataError(
                f"{folder}, example {sample['__key__']}",
                got=f"label {label}, {'an' if image is not None else 'no'} image",
                expected=f"a png and a label below {len(manifest.labels)}",
                cure="run the stage prepare again",
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


def example_places(folder: Path, manifest: Manifest) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each image's bytes are, in shard order: (shard, first byte, length) (N, 3), and the labels (N,).

    Only the tar files' heads and the labels are read.

    Raises:
        DataError: an example without image or label, a label out of range, or a count that is not the manifest's.
    """
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, shard in enumerate(manifest.shards):
        images: dict[str, tuple[int, int, int]] = {}
        found: dict[str, int] = {}
        with tarfile.open(folder / shard.name) as tar:
            for entry in tar:
                key, _, kind = entry.name.rpartition(".")
                content = tar.extractfile(entry) if kind == "cls" else None
                if content is not None:
                    found[key] = int(content.read())
                elif kind in ("png", "jpg", "jpeg", "webp"):
                    images[key] = (number, entry.offset_data, entry.size)
        bad = [key for key in images.keys() | found.keys() if key not in images
               or not 0 <= found.get(key, -1) < len(manifest.labels)]  # fmt: skip
        if bad or len(images) != shard.count:
            raise DataError(
                folder / shard.name,
                got=f"{len(images)} images" + (f", {bad[0]} without image or valid label" if bad else ""),
                expected=f"{shard.count} with a label below {len(manifest.labels)} each",
                cure="run the stage prepare again",
            )
        places += images.values()
        labels += [found[key] for key in images]
    return np.array(places, np.int64).reshape(-1, 3), np.array(labels, np.int64)


def read_all(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], Manifest]:
    """Every image and label of a small split, in memory."""
    manifest = load_manifest(folder)
    parts = list(read_batches(folder, manifest, batch_size=1000))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), manifest


def contact_sheet(path: Path, images: NDArray[np.uint8], *, columns: int = 12, zoom: int = 2) -> None:
    """A PNG that shows images (N, H, W, 3) side by side, so that a person can see the data."""
    count = len(images) // columns * columns
    rows = images[:count].reshape(-1, columns, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    enlarged = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(_png(enlarged))
