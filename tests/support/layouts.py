"""Data sets in miniature with exactly the layouts and names in which they are published, in every container."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from modelstock.data.classes import wnids
from modelstock.params import ClassesParams, PrepareParams

IMAGENET = ClassesParams(names="imagenet", templates=["{}"])


@lru_cache(maxsize=4000)
def picture(seed: int, kind: str = "jpeg", size: tuple[int, int] = (8, 8)) -> bytes:
    """An image file of `size` (width, height), another for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1_300_000_000
            archive.addfile(entry, io.BytesIO(content))
    return path


def folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def packed(kind: str, files: dict[str, bytes], place: Path) -> Path:
    """Files as a `folder`, `tar`, `tar.gz` or `zip` in the folder `place`."""
    path = place / f"packed.{kind}"
    if kind == "folder":
        return folder(path, files)
    if kind == "zip":
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    return tar(path, files, "w:gz" if kind == "tar.gz" else "w")


def encrypted_zip(path: Path, files: dict[str, bytes], password: bytes) -> Path:
    """A zip archive encrypted with ZipCrypto, as ObjectNet is; Python reads such archives but does not write them."""

    def crc(value: int, byte: int) -> int:
        return zlib.crc32(bytes([byte]), value ^ 0xFFFFFFFF) ^ 0xFFFFFFFF

    def encrypt(plain: bytes) -> bytes:
        keys = [0x12345678, 0x23456789, 0x34567890]

        def update(byte: int) -> None:
            keys[0] = crc(keys[0], byte)
            keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
            keys[2] = crc(keys[2], keys[1] >> 24)

        for byte in password:
            update(byte)
        out = bytearray()
        for byte in plain:
            mask = keys[2] | 2
            out.append(byte ^ ((mask * (mask ^ 1)) >> 8 & 0xFF))
            update(byte)
        return bytes(out)

    body, directory = bytearray(), bytearray()
    for name, content in files.items():
        check = zlib.crc32(content)
        data = encrypt(bytes(11) + bytes([check >> 24]) + content)
        common = struct.pack("<HHHHHIIIHH", 20, 1, 0, 0, 0x21, check, len(data), len(content), len(name), 0)
        directory += b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        directory += name.encode()
        body += b"PK\3\4" + common + name.encode() + data
    end = struct.pack("<HHHHIIH", 0, 0, len(files), len(files), len(directory), len(body), 0)
    path.write_bytes(bytes(body) + bytes(directory) + b"PK\5\6" + end)
    return path


def imagenet_train(each: int = 1) -> dict[str, bytes]:
    """`<wnid>/<wnid>_<number>.JPEG`."""
    return {f"{w}/{w}_{i}.JPEG": picture(10 * c + i) for c, w in enumerate(wnids()) for i in range(each)}


def nested(path: Path, files: dict[str, bytes]) -> Path:
    """ILSVRC2012_img_train.tar: a tar archive of a tar archive a class."""
    inner: dict[str, dict[str, bytes]] = {}
    for name, content in files.items():
        inner.setdefault(name.split("/")[0], {})[name.split("/")[1]] = content
    archives = {}
    for wnid, members in inner.items():
        archives[f"{wnid}.tar"] = tar(path.parent / "one.tar", members).read_bytes()
    (path.parent / "one.tar").unlink()
    return tar(path, archives)


def devkit(path: Path, truth: list[str], order: list[str]) -> Path:
    """ILSVRC2012_devkit_t12.tar.gz: ID i + 1 is `order[i]`; further IDs are inner nodes. `truth`: a wnid an image."""
    from scipy.io import savemat

    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    rows = [(i + 1, w, "words", "gloss", 0, [], 0, 1300) for i, w in enumerate([*order, "n00001740", "n00002137"])]
    synsets = np.zeros((len(rows), 1), dtype=[(name, object) for name in fields])
    for i, row in enumerate(rows):
        synsets[i, 0] = tuple(np.array(value) if not isinstance(value, str) else value for value in row)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    lines = "".join(f"{order.index(wnid) + 1}\n" for wnid in truth)
    files = {
        "ILSVRC2012_devkit_t12/readme.txt": b"see data",
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
    }
    return folder(path.parent, files) if path.suffix != ".gz" else tar(path, files, "w:gz")


def objectnet() -> dict[str, bytes]:
    """Two folders with a class, one with two, and one without any; names stand on lines of another order."""
    lines = np.random.default_rng(0).permutation(1000).tolist()  # class i's name is on line lines[i], from 0
    names = {line: f"name {i}, of class {i}" for i, line in enumerate(lines)}
    images = ["alarm_clock", "bench", "t-shirt", "air_freshener"]
    files = {f"objectnet-1.0/images/{f}/{i}{f}.png": picture(i, "png", (12, 10)) for f in images for i in range(2)}
    mappings = {
        "folder_to_objectnet_label.json": json.dumps(
            {"t-shirt": "T-shirt", "alarm_clock": "Alarm clock", "air_freshener": "Air freshener", "bench": "Bench"}
        ),
        "objectnet_to_imagenet_1k.json": json.dumps(
            {
                "Alarm clock": "name 409, of class 409; name 530, of class 530",
                "Bench": "name 703, of class 703",
                "T-shirt": "name 610, of class 610",
            }
        ),
        "pytorch_to_imagenet_2012_id.json": json.dumps({str(i): line for i, line in enumerate(lines)}),
        "imagenet_to_label_2012_v2": "".join(f"{names[line]}\n" for line in range(1000)),
    }
    return files | {f"objectnet-1.0/mappings/{name}": text.encode() for name, text in mappings.items()}


def settings(path: Path, *, name: str = "test", shard_size: int = 300, **given) -> PrepareParams:
    """Params with one split of files, a test set unless it is called train or held-out."""
    split = {"source": "files", "path": str(path), "role": None if name in ("train", "held-out") else "shift"}
    own = {k: given.pop(k) for k in list(given) if k in ("labels", "part", "devkit", "mappings", "password")}
    base = {"seed": 0, "shard_size": shard_size, "reference_draws": 1, "reference_epochs": 1}
    return PrepareParams(**base, **given, splits={name: split | own})


def examples(out: Path, manifest) -> list[tuple[str, int, str, bytes]]:
    """Key, label, suffix and image bytes of every example, as the standard library reads them."""
    found = []
    for path in manifest.paths(out):
        with tarfile.open(path) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}
        for name, content in members.items():
            key, suffix = name.split(".")
            if suffix != "cls":
                found.append((key, int(members[f"{key}.cls"]), suffix, content))
    return found
