"""Writes webdataset shards whose bytes repeat.

A folder holds `000000.tar`, `000001.tar`, ... with one `<key>.cls` and one `<key>.png`, `.jpg`, `.webp` or `.txt` per
example, and the manifest; a folder without a manifest is an unfinished one.
"""

import html
import io
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modelstock.data.manifest import FILE_NAME, Manifest, Shard, make_manifest, save_manifest
from modelstock.files import atomic_path, sha256_of


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
    """Write one tar file, whole or not at all, of (number, label, suffix, file); None where there is none."""
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
    for old in [folder / FILE_NAME, *folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9].tar")]:
        old.unlink(missing_ok=True)


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


def contact_sheet(path: Path, images: NDArray[np.uint8], *, columns: int = 12, zoom: int = 2) -> None:
    """A PNG that shows images (N, H, W, 3) side by side, so that a person can see the data."""
    columns = min(columns, len(images))
    count = len(images) // columns * columns
    rows = images[:count].reshape(-1, columns, *images.shape[1:])
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    enlarged = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(Image.fromarray(enlarged)))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>body {{ font: 1em/1.4 sans-serif; max-width: 50em; margin: 2em auto }} li {{ margin: .3em 0 }}</style></head>
<body><h1>{title}</h1>
{sections}</body></html>
"""
_LONGEST_SHOWN = 500  # characters of a text


def contact_page(path: Path, title: str, texts: Mapping[str, Sequence[str]]) -> None:
    """A page of texts below headings, so that a person can see the data; nothing in it is run or fetched."""
    sections = "".join(
        f"<h2>{html.escape(heading)}</h2>\n<ul>\n"
        + "".join(f'<li dir="auto">{html.escape(_short(text))}</li>\n' for text in shown)
        + "</ul>\n"
        for heading, shown in texts.items()
    )
    with atomic_path(path) as temporary:
        temporary.write_text(_PAGE.format(title=html.escape(title), sections=sections), encoding="utf-8")


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."
