"""Makes a split's shards, manifest and contact sheet, from the embedded benchmark or from what is on disk.

A split on disk becomes shards by slices of its list of images or texts, each made by any process. Finished shards wait
in a scratch folder of this list and these settings until all are there, so that a run that is killed goes on where it
was, and are then linked into the output folder, the manifest last.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from modelstock.data.classes import class_names
from modelstock.data.containers import Container, File, TarGz, Tars
from modelstock.data.decoder import Unreadable, decode, facts_of
from modelstock.data.index import TEXT, index_shards
from modelstock.data.layouts import Item, Source, open_source, subset
from modelstock.data.manifest import SHARD_NAME, Manifest, Shard, make_manifest, save_manifest
from modelstock.data.shapes.names import NAMES
from modelstock.data.shapes.render import SPLITS, Drawn, drawn
from modelstock.data.shards import (
    clear,
    contact_page,
    contact_sheet,
    png,
    write_shard,
    write_shards,
)
from modelstock.data.text_sources import open_texts
from modelstock.data.texts import text_of
from modelstock.errors import DataError, few
from modelstock.files import atomic_path, sha256_of, write_json
from modelstock.notices import collected, notice
from modelstock.params import ClassesParams, DrawnSplit, OnDisk, PrepareParams, TextsSplit
from modelstock.progress import progress_bar
from modelstock.provenance import key_of
from modelstock.workers import follow_parent

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_SHOWN = 72  # images of a contact sheet
_SHOWN_TEXTS = 12  # per label
# What is unusual about an image and not refused, as a notice says it of some.
_TURNED = "an EXIF orientation, which is not applied, as open_clip applies none: turn the pixels of photographs first"
_FRAMES = "several frames, of which the first is used"
Facts = dict[str, Any]  # of a shard: path, shard (None for an empty one), examples, and what `Seen` has
Job = tuple[Any, ...]  # a function and its arguments


def prepare(
    split: str,
    params: PrepareParams,
    classes: ClassesParams,
    folder: Path,
    *,
    scratch: Path = Path("scratch/prepare"),
    threads: int = 1,
) -> Manifest:
    """Write one split's shards, manifest and contact sheet; shards that are used in place are only checked.

    `threads`: of torch, with which the embedded benchmark's adversarial split trains its reference model.

    Raises:
        DataError: a split that is not known, a source that is not as it should be, or too many unreadable examples.
    """
    if split not in params.splits:
        raise DataError("split", got=repr(split), expected=", ".join(params.splits), cure="name one of prepare.splits")
    source = params.splits[split]
    if isinstance(source, DrawnSplit):
        return _draw(split, source.images, params, folder, threads)
    return _gather(split, source, params, classes, folder, scratch)


def _draw(split: str, count: int, params: PrepareParams, folder: Path, threads: int) -> Manifest:
    """Write a split of the embedded benchmark."""
    plan = SPLITS[split]
    if plan.adversarial:
        from modelstock.data.shapes.reference import missed  # torch takes seconds, in every process that imports it

        source = missed(split, params, count, threads=threads)
    else:
        source = islice(drawn(split, seed=params.seed), count)
    shown: list[NDArray[np.uint8]] = []

    def watched() -> Iterator[Drawn]:
        for image, label in progress_bar(source, total=count, desc=split, unit="image", mininterval=1):
            if len(shown) < _SHOWN:
                shown.append(image)
            yield image, label

    manifest = write_shards(
        folder,
        watched(),
        benchmark=split,
        role=params.role(split),
        labels=list(plan.labels),
        label_groups=[[NAMES.index(c) for c in group] for group in plan.labels.values()],
        classes=NAMES,
        shard_size=params.shard_size,
    )
    contact_sheet(folder / "contact.png", np.stack(shown))
    return manifest


@dataclass(frozen=True)
class Encoding:
    """How an image is stored: as it is, or with `border` cut off and its shorter side then at most `short_side`."""

    short_side: int | None
    quality: int
    border: int


def stored(content: bytes, suffix: str | None, encoding: Encoding) -> tuple[str, bytes]:
    """An image's suffix and bytes in a shard; the image is decoded in full either way.

    `suffix`: that of its format, None for a format that is not kept as it is.

    Raises:
        Unreadable: see modelstock.data.decoder.
    """
    picture = decode(content, encoding.border)
    shorter, side = min(picture.size), encoding.short_side
    if side is None or (shorter <= side and not encoding.border):
        return (suffix, content) if suffix else ("png", png(decode(content)))
    if shorter <= side:
        return "png", png(picture)
    buffer = io.BytesIO()
    smaller = picture.resize([round(length * side / shorter) for length in picture.size], Image.Resampling.BICUBIC)
    smaller.save(buffer, "jpeg", quality=encoding.quality)
    return "jpg", buffer.getvalue()


class Seen:
    """What a shard's examples are beside their bytes: name -> why it is unreadable, and what is unusual, counted."""

    def __init__(self) -> None:
        self.unreadable: dict[str, str] = {}
        self.unusual = Counter[str]()

    def facts(self) -> dict[str, Any]:
        """Both, as JSON has them."""
        return {"unreadable": self.unreadable, "unusual": dict(self.unusual)}

    def stored(self, container: Container, item: Item, encoding: Encoding | None) -> tuple[str, bytes] | None:
        """An example's suffix and bytes in a shard; None for an unreadable one. `encoding`: None for texts."""
        try:
            content = container.read(item.file)
            if encoding is None:
                text_of(content)
                return TEXT, content
            facts = facts_of(content)
            made = stored(content, _SUFFIXES.get(facts.format), encoding)
        except MemoryError:
            raise
        except Exception as error:  # containers too raise much for what is damaged
            known = isinstance(error, Unreadable)
            self.unreadable[item.name] = " ".join(f"{error if known else f'{type(error).__name__}: {error}'}".split())
            return None
        self.unusual.update([_TURNED] * facts.turned + [_FRAMES] * facts.frames)
        return made


def _make(container: Container, items: Sequence[Item], first: int, path: Path, encoding: Encoding | None) -> Facts:
    """Write one shard of `items`, numbered from `first` on, and beside it what is known of it."""
    seen = Seen()

    def examples() -> Iterator[tuple[int, int, str, bytes]]:
        for number, item in enumerate(items, first):
            if made := seen.stored(container, item, encoding):
                yield number, item.label, *made

    shard = write_shard(path, examples())
    facts = {"shard": shard and shard.model_dump(), "examples": len(items), **seen.facts()}
    write_json(path.with_suffix(".json"), facts)  # last: it says that the shard is whole
    path.with_suffix(".spool").unlink(missing_ok=True)
    return {"path": path, **facts}


def _check(container: Container, items: Sequence[Item], path: Path, encoding: Encoding | None) -> Facts:
    """Decode one shard's images or texts where they are, and hash it."""
    seen = Seen()
    for item in items:
        seen.stored(container, item, encoding)
    shard = {"name": path.name, "count": len(items), "sha256": sha256_of(path)}
    return {"path": path, "shard": shard, "examples": len(items), **seen.facts()}


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it."""
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


def _results(jobs: Iterable[Job], workers: int) -> Generator[Facts, None, None]:
    """Call (function, arguments...) in `workers` processes; jobs are asked for only a few ahead."""
    executor: Executor = (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_parent)
        if workers > 1
        else _Here()
    )
    waiting: set[Future[Any]] = set()
    try:
        for function, *arguments in jobs:
            waiting.add(executor.submit(function, *arguments))
            if len(waiting) >= 2 * workers or workers == 1:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise DataError(
            "prepare",
            got="a worker process that ended",
            expected=f"{workers} that work",
            cure="lower prepare.workers if memory was short, and run it again: finished shards are kept",
        ) from error
    except OSError as error:
        raise DataError(
            "prepare",
            got=f"{error}",
            expected="room for the shards, and a source that stays readable",
            cure="make room and run it again: finished shards are kept",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _gather(
    split: str, source: OnDisk, params: PrepareParams, classes: ClassesParams, folder: Path, scratch: Path
) -> Manifest:
    """Write a split that is on disk."""
    given, out = Path(source.path).resolve(), folder.resolve()
    if given.is_relative_to(out) or out.is_relative_to(given):
        raise DataError(
            folder, got=f"the place of the source {source.path}", expected="another folder", cure="write elsewhere"
        )
    with collected() as notices:
        texts = isinstance(source, TextsSplit)
        found = open_texts(split, params, classes) if texts else open_source(split, params, classes)
        in_place = found.shards and source.part == "all" and (texts or params.short_side is None)
        found = found if in_place else subset(found)
        jobs, done, work = (_checks(found), [], None) if in_place else _jobs(found, params, scratch)
        results = _collect(split, source.path, jobs, done, found, params, in_place)
        unreadable = sorted(name for facts in results for name in facts["unreadable"])
        _notice(split, found, results, unreadable)
    meaning = found.meaning
    manifest = make_manifest(
        benchmark=split,
        role=params.role(split),
        labels=meaning.names,
        label_groups=meaning.groups,
        classes=class_names(classes),
        shards=[Shard(**facts["shard"]) for facts in results if facts["shard"]],
        # Cutting the border is part of re-encoding; else it waits until an image is read.
        border=meaning.border if params.short_side is None else 0,
        root=str(given if given.is_dir() else given.parent) if in_place else None,
        unreadable=[*found.unreadable, *unreadable],
        left_out=found.left_out,
        notices=[line.removeprefix(f"{split}: ") for line in notices],  # who reads them names the benchmark
        modality=found.modality,
        rules=found.rules,
    )
    clear(folder)
    if work is not None:
        for shard in manifest.shards:
            _link(work / shard.name, folder / shard.name)
    if manifest.modality == "text":
        contact_page(folder / "contact.html", split, _shown_texts(folder, manifest))
    else:
        contact_sheet(folder / "contact.png", _shown(folder, manifest), zoom=1)
    save_manifest(folder, manifest)
    if work is not None:
        shutil.rmtree(work)
    return manifest


def _notice(split: str, source: Source, results: Sequence[Facts], unreadable: Sequence[str]) -> None:
    """Give the notices of a split's examples: of the unreadable, the unusual and what is left out."""
    total, noun = len(source.items), f"{source.modality}s"
    if unreadable:
        notice(split, f"{len(unreadable)} of {total} {noun} cannot be read and are left out: {few(unreadable)}")
    for what, count in sorted(sum((Counter(facts["unusual"]) for facts in results), Counter[str]()).items()):
        notice(split, f"{count} of {total} {noun} have {what}")
    if source.left_out:
        notice(split, "left out: " + ", ".join(f"{count} {what}" for what, count in sorted(source.left_out.items())))


def _collect(
    split: str,
    place: str,
    jobs: Iterable[Job],
    done: Sequence[Facts],
    source: Source,
    params: PrepareParams,
    in_place: bool,
) -> list[Facts]:
    """What is known of every shard, in their order.

    Raises:
        DataError: more unreadable images or texts than params allow; none may be in shards that are used in place.
    """
    total, noun = len(source.items), f"{source.modality}s"
    allowed = 0.0 if in_place else params.unreadable * total
    unreadable: dict[str, str] = {}
    results = []
    with (
        progress_bar(
            total=total, initial=sum(f["examples"] for f in done), desc=split, unit=source.modality, mininterval=1
        ) as bar,
        closing(_results(jobs, params.workers)) as fresh,
    ):
        for facts in chain(done, fresh):
            results.append(facts)
            bar.update(facts["examples"] if len(results) > len(done) else 0)
            unreadable |= facts["unreadable"]
            if len(unreadable) > allowed:
                names = sorted(unreadable)
                cure = "leave them out of the shards" if in_place else "fix or remove them, or raise prepare.unreadable"
                raise DataError(
                    place,
                    got=f"{len(names)} unreadable {noun} of {total}: {few(names)} ({unreadable[names[0]]})",
                    expected=f"at most {allowed:g}",
                    cure=cure,
                )
    return sorted(results, key=lambda facts: facts["path"])


def _checks(source: Source) -> Iterator[Job]:
    """A job for every shard that is used in place."""
    container = source.container
    assert isinstance(container, Tars)
    encoding = Encoding(None, 0, source.meaning.border) if source.modality == "image" else None
    wrong = [path.name for path in container.paths if not re.fullmatch(SHARD_NAME, path.name)]
    if wrong:
        raise DataError(container.place, got=f"shards {few(wrong)}", expected=f"names {SHARD_NAME}", cure="rename them")
    items: list[list[Item]] = [[] for _ in container.paths]
    for item in source.items:
        items[item.file.place[0]].append(item)
    for path, own in zip(container.paths, items, strict=True):
        if own:
            yield _check, container, own, path, encoding


def _jobs(source: Source, params: PrepareParams, scratch: Path) -> tuple[Iterator[Job], list[Facts], Path]:
    """A job for every shard that is not finished yet, what is known of those that are, and the folder of both."""
    encoding = None
    if source.modality == "image":
        encoding = Encoding(params.short_side, params.quality, source.meaning.border)
    size = params.shard_size
    work = scratch / _fingerprint(source, encoding, size)
    work.mkdir(parents=True, exist_ok=True)
    for rest in [*work.glob(".*.tmp"), *work.glob("*.spool")]:
        rest.unlink()
    done, todo = [], []
    for number, first in enumerate(range(0, len(source.items), size)):
        path = work / f"{number:06d}.tar"
        known = path.with_suffix(".json")
        if known.is_file():
            done.append({"path": path, **json.loads(known.read_bytes())})
        else:
            todo.append((first, path))
    if isinstance(source.container, TarGz):
        return _spooled(source.container, source.items, todo, size, encoding), done, work
    jobs = (
        (_make, source.container, source.items[first : first + size], first, path, encoding) for first, path in todo
    )
    return jobs, done, work


def _spooled(
    archive: TarGz, items: Sequence[Item], todo: Sequence[tuple[int, Path]], size: int, encoding: Encoding | None
) -> Iterator[Job]:
    """Jobs of an archive that can only be read from its start.

    It is read once more; every example goes to a file of its shard's, which becomes the shard when all of it is there.
    An archive in the order of its classes needs few such files at a time.
    """
    paths = dict(todo)
    places = {item.file.place[0]: index for index, item in enumerate(items) if index // size * size in paths}
    waiting: dict[int, dict[int, Item]] = {first: {} for first in paths}
    for number, stream in archive.contents():
        if (index := places.get(number)) is None:
            continue
        first, content = index // size * size, stream.read()
        spool = paths[first].with_suffix(".spool")
        with open(spool, "ab") as file:
            start = file.tell()
            file.write(content)
        moved = File(items[index].file.path, len(content), (0, start))
        waiting[first][index] = items[index]._replace(file=moved)
        if len(waiting[first]) == min(size, len(items) - first):
            ready = [item for _, item in sorted(waiting.pop(first).items())]
            yield _make, Tars(spool, (spool,)), ready, first, paths[first], encoding
    if waiting:
        raise DataError(
            archive.place, got="another archive than before", expected="one that stays", cure="run it again"
        )


def _fingerprint(source: Source, encoding: Encoding | None, shard_size: int) -> str:
    """24 hexadecimal digits of everything that the shards' bytes depend on; files go by size and time."""
    container = source.container
    files = container.paths if isinstance(container, Tars) else [container.place, container.place / "state.json"]
    changes = [[f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    items = hashlib.sha256()
    for item in source.items:
        items.update(repr(item).encode())
    facts: dict[str, Any] = {"source": str(container.place.resolve()), "changes": changes, "items": items.hexdigest()}
    facts["column"] = getattr(container, "text", None)  # of a table: the same rows may have several
    settings = {"modality": source.modality} if encoding is None else asdict(encoding)
    return key_of("modelstock.data.preparation", facts, {**settings, "shard_size": shard_size})


def _link(source: Path, target: Path) -> None:
    """Let `target` be `source` too, which stays until all are there; a copy where file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def _shown(folder: Path, manifest: Manifest) -> NDArray[np.uint8]:
    """Images of an even spread over a folder's examples, as squares (N, 64, 64, 3)."""
    places, _ = index_shards(folder, manifest)
    files = manifest.paths(folder)
    squares = []
    for row in np.linspace(0, len(places) - 1, min(_SHOWN, len(places))).astype(int):
        shard, start, length = places[row].tolist()
        with open(files[shard], "rb") as file:
            file.seek(start)
            picture = decode(file.read(length), manifest.border)
        squares.append(np.asarray(ImageOps.fit(picture, (64, 64), Image.Resampling.BICUBIC)))
    return np.stack(squares)


def _shown_texts(folder: Path, manifest: Manifest) -> dict[str, list[str]]:
    """Label -> texts of an even spread over its examples."""
    places, labels = index_shards(folder, manifest)
    files = manifest.paths(folder)
    shown: dict[str, list[str]] = {}
    for number, label in enumerate(manifest.labels):
        rows = np.flatnonzero(labels == number)
        texts = shown.setdefault(f"{label} ({len(rows)})", [])
        for row in rows[np.linspace(0, len(rows) - 1, min(_SHOWN_TEXTS, len(rows))).astype(int)]:
            shard, start, length = places[row].tolist()
            with open(files[shard], "rb") as file:
                file.seek(start)
                texts.append(text_of(file.read(length)))
    return shown
