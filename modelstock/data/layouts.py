"""Data sets as they are published: which files are images or texts, and what label each has.

A source is listed before anything is read from it: (label, name, file) for every example, ordered by label and then by
name as text, so that a folder, an archive and an archive of archives of the same data give the same list. The class of
an image is the folder that it is in, at any depth below leading folders such as `imagenet-r/`; a name is
`<class folder>/<file>`. What is left out is counted, and what cannot be placed is an error.

Webdataset shards and folders of the library `datasets` hold integers. They count the classes in the order of `labels`:
for ImageNet-R and -A the 200 WordNet ids in order; for ObjectNet the 113 mapped folders sorted by name, as in
CLIP_benchmark's `wds_objectnet`.
"""

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import splitext
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from modelstock.data.classes import class_names, folder_names, wnids
from modelstock.data.containers import Container, File, Folder, Rows, TarGz, Tars, open_container
from modelstock.data.decoder import SUFFIXES
from modelstock.data.index import TEXT, Example, pair
from modelstock.data.manifest import Modality
from modelstock.errors import DataError, ParamsError, few, nearest
from modelstock.notices import notice
from modelstock.params import ClassesParams, FilesSplit, OnDisk, PrepareParams, TextsSplit
from modelstock.progress import progress_bar

# What lies beside images and is none.
_TEXTS = frozenset(
    (".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".html", ".pdf", ".yaml", ".yml", ".log", ".mat", ".ini", ".url")
)
_JUNK = frozenset(("thumbs.db", "desktop.ini", "license", "readme"))
# What no name may have: control characters, and bytes that are no UTF-8.
_STRANGE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
TEXT_SUFFIX = f".{TEXT}"
_FLAT = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")
OBJECTNET_BORDER = 2  # pixels of red around every image of ObjectNet, there to find it in training sets
_MAPPINGS = (
    "folder_to_objectnet_label.json",
    "objectnet_to_imagenet_1k.json",
    "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)


class Item(NamedTuple):
    """An image or text: its label, its name and its file."""

    label: int
    name: str
    file: File


@dataclass(frozen=True)
class Meaning:
    """What labels mean: class folder -> label, the labels' names, and the head's classes that stand for each.

    `whole`: every label must have images. `unmapped`: folders that are left out, having no class of the head's.
    `border`: pixels to cut off each side.
    """

    folders: Mapping[str, int]
    names: Sequence[str]
    groups: Sequence[Sequence[int]]
    whole: bool = True
    unmapped: frozenset[str] = frozenset()
    border: int = 0


@dataclass(frozen=True)
class Source:
    """Images or texts of a split, in their order.

    `left_out`: what of the container is none of them on purpose, counted. `shards`: they are webdataset shards, which
    can be used where they are. `unreadable`: rows of a table that are no examples, by what names them. `rules`: how
    texts were chosen and labelled, for the manifest.
    """

    container: Container
    items: Sequence[Item]
    meaning: Meaning
    left_out: Mapping[str, int] = field(default_factory=dict)
    shards: bool = False
    modality: Modality = "image"
    unreadable: Sequence[str] = ()
    rules: Mapping[str, str] = field(default_factory=dict)


def _different(names: Sequence[str], folders: Iterable[str]) -> list[str]:
    """Names, with the folder where one comes twice, as two of ImageNet's do."""
    times = Counter(names)
    return [n if times[n] == 1 else f"{n} ({f})" for n, f in zip(names, folders, strict=True)]


class Head(NamedTuple):
    """The head's classes: the folder of each, and its name."""

    folders: Sequence[str]
    names: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the folders or integers of a published data set mean.

    `meaning`: from the head, the split's place and the contents of `mappings`. `imagenet`: it is for heads with
    ImageNet's classes. `mappings`: files that it needs from a folder of that name, in the source or beside it.
    """

    title: str
    meaning: Callable[[Head, Path, Mapping[str, bytes]], Meaning]
    imagenet: bool = True
    mappings: Sequence[str] = ()


def layout_of(split: OnDisk) -> Layout:
    """The layout that a split names.

    Raises:
        ParamsError: there is none of that name.
    """
    if split.labels not in LAYOUTS:
        cure = nearest(split.labels, list(LAYOUTS))
        raise ParamsError("labels", got=repr(split.labels), expected=", ".join(LAYOUTS), cure=cure)
    return LAYOUTS[split.labels]


def meaning(split: OnDisk, classes: ClassesParams, mappings: Mapping[str, bytes], *, whole: bool) -> Meaning:
    """What the folders or integers of a layout mean to the head.

    `mappings`: the contents of the files that the layout needs. `whole`: whether a set with the head's own classes
    must have all of them.

    Raises:
        DataError: a layout of ImageNet for other classes, or mappings that do not fit together.
    """
    layout, folders = layout_of(split), folder_names(classes)
    if layout.imagenet and classes.names != "imagenet":
        raise DataError(
            f"labels: {split.labels}",
            got=f"{len(folders)} classes of another kind",
            expected="classes.names: imagenet",
            cure="set it, or use labels: classes for folders named by your own classes",
        )
    head = Head(folders, _different(class_names(classes), folders))
    place = (isinstance(split, FilesSplit) and split.mappings) or split.path
    meant = layout.meaning(head, Path(place), mappings)
    return meant if layout.imagenet else replace(meant, whole=whole)


def _by_class(head: Head, place: Path, mappings: Mapping[str, bytes]) -> Meaning:
    """A folder per class of the head."""
    return Meaning({f: i for i, f in enumerate(head.folders)}, head.names, [[i] for i in range(len(head.folders))])


def _by_number(head: Head, place: Path, mappings: Mapping[str, bytes]) -> Meaning:
    """Folders are the labels themselves: 10 comes after 9."""
    return Meaning({str(i): i for i in range(len(head.names))}, head.names, [[i] for i in range(len(head.names))])


def _by_wnid(name: str, head: Head, place: Path, mappings: Mapping[str, bytes]) -> Meaning:
    """A folder per class of the subset `name` of ImageNet's."""
    chosen = wnids(name)
    places = [head.folders.index(wnid) for wnid in chosen]
    return Meaning({w: i for i, w in enumerate(chosen)}, [head.names[p] for p in places], [[p] for p in places])


def _objectnet(head: Head, place: Path, mappings: Mapping[str, bytes]) -> Meaning:
    """ObjectNet's labels that are in ImageNet, each with the classes that stand for it.

    A label's ImageNet names are separated by "; ". A name's line in `imagenet_to_label_2012_v2`, counted from 0, is
    the number that `pytorch_to_imagenet_2012_id.json` gives for a class in the order of WordNet ids.
    Source: the code of WiSE-FT (Wortsman et al., arXiv 2109.01903) and ObjectNet's own.
    """
    missing = [name for name in _MAPPINGS if name not in mappings]
    if missing:
        raise DataError(
            place,
            got=f"no {few(missing)}",
            expected="ObjectNet's folder mappings, beside its images",
            cure="name it as `mappings` of the split",
        )
    try:
        labels: dict[str, str] = json.loads(mappings[_MAPPINGS[0]])
        imagenet: dict[str, str] = json.loads(mappings[_MAPPINGS[1]])
        class_of_line = {line: int(i) for i, line in json.loads(mappings[_MAPPINGS[2]]).items()}
        lines = mappings[_MAPPINGS[3]].decode().splitlines()
        class_of_name = {name.strip(): class_of_line[line] for line, name in enumerate(lines)}
        groups = {label: [class_of_name[name] for name in text.split("; ")] for label, text in imagenet.items()}
        mapped = sorted(folder for folder, label in labels.items() if label in groups)
        lost = sorted(groups.keys() - labels.values())
        if lost:
            raise KeyError(lost[0])
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(
            place,
            got=f"mappings that do not fit together ({type(error).__name__}: {error})",
            expected=f"ObjectNet's {few(_MAPPINGS)}",
            cure="copy its folder mappings again",
        ) from error
    return Meaning(
        {folder: label for label, folder in enumerate(mapped)},
        [labels[folder] for folder in mapped],
        [groups[labels[folder]] for folder in mapped],
        unmapped=frozenset(labels.keys() - set(mapped)),
        border=OBJECTNET_BORDER,
    )


# A data layout is one entry: the name that `labels` of a split gives it, and what it means.
LAYOUTS: dict[str, Layout] = {
    "classes": Layout(title="a folder per class of params", meaning=_by_class, imagenet=False),
    "imagenet": Layout(title="ImageNet's training or validation set", meaning=_by_class),
    "imagenet-v2": Layout(title="ImageNetV2", meaning=_by_number),
    "imagenet-r": Layout(title="ImageNet-R", meaning=partial(_by_wnid, "imagenet-r")),
    "imagenet-a": Layout(title="ImageNet-A", meaning=partial(_by_wnid, "imagenet-a")),
    "imagenet-sketch": Layout(title="ImageNet-Sketch", meaning=_by_class),
    "objectnet": Layout(title="ObjectNet", meaning=_objectnet, mappings=_MAPPINGS),
}


def _mappings(split: FilesSplit, container: Container, files: Sequence[File]) -> dict[str, bytes]:
    """The files that a layout needs: in the folder that params name, in the source, or beside it."""
    wanted = layout_of(split).mappings
    if not wanted:
        return {}
    path = Path(split.path)
    for folder in [Path(split.mappings)] if split.mappings else [path / "mappings", path.parent / "mappings"]:
        present = {name: folder / name for name in wanted if (folder / name).is_file()}
        if present or split.mappings:
            return {name: file.read_bytes() for name, file in present.items()}
    within = [(file, PurePosixPath(file.path)) for file in files]
    return {p.name: container.read(f) for f, p in within if p.name in wanted and p.parent.name == "mappings"}


def read_devkit(path: Path) -> list[str]:
    """The WordNet id of each image of ImageNet's validation set, from the archive of the development kit or its folder.

    The ground truth has an ILSVRC2012_ID a line; their order is not that of WordNet ids, so meta.mat translates.

    Raises:
        DataError: not the kit of task 1 and 2, ILSVRC2012_devkit_t12.
    """
    wanted = {"data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"}
    found: dict[str, bytes] = {}
    try:
        container: Container = TarGz(path) if path.is_file() else Folder(path)
        for file in container.files():
            name = "/".join(file.path.split("/")[-2:])
            if name in wanted:
                found[name] = container.read(file)
        from scipy.io import loadmat

        synsets = loadmat(io.BytesIO(found["data/meta.mat"]), squeeze_me=True)["synsets"]  # type: ignore[arg-type]
        wnid_of = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        truth = found["data/ILSVRC2012_validation_ground_truth.txt"].split()
        return [wnid_of[int(number)] for number in truth]
    except (OSError, tarfile.TarError, gzip.BadGzipFile, KeyError, ValueError, TypeError) as error:
        raise DataError(
            path,
            got=f"no development kit ({type(error).__name__}: {error})",
            expected="ILSVRC2012_devkit_t12.tar.gz or its folder, with data/meta.mat and the ground truth in data",
            cure="name it as `devkit` of the split",
        ) from error


def modality_of(split: OnDisk) -> Modality:
    """What the examples of a split are."""
    return "text" if isinstance(split, TextsSplit) else "image"


def _is_junk(path: str, modality: Modality) -> bool:
    parts = path.lower().split("/")
    stem, suffix = splitext(parts[-1])
    hidden = any(part.startswith(".") or part == "__macosx" for part in parts)
    if modality == "text" and suffix == TEXT_SUFFIX:
        return hidden or stem in _JUNK
    return hidden or parts[-1] in _JUNK or suffix in _TEXTS


def by_folder(split: OnDisk, files: Sequence[File], meaning: Meaning) -> tuple[list[Item], dict[str, int]]:
    """Every image or text with the label of its class folder, and what is left out, counted.

    Raises:
        DataError: folders that are not those of the layout, or files that are no examples by their names.
    """
    modality = modality_of(split)
    suffixes = SUFFIXES if modality == "image" else (TEXT_SUFFIX,)
    rest = [file for file in files if not _is_junk(file.path, modality)]
    images = [(file, file.path.split("/")) for file in rest if splitext(file.path)[1].lower() in suffixes]
    known = meaning.folders.keys() | meaning.unmapped
    # Class folders are at one depth: where most of their names are.
    depth = max(range(4), key=lambda d: len({p[d] for _, p in images if len(p) > d + 1 and p[d] in known}))
    placed = [(file, parts) for file, parts in images if len(parts) > depth + 1 and parts[depth] in known]
    if images and not placed and isinstance(split, FilesSplit):
        flat = [(match, file) for file, _ in images if (match := _FLAT.fullmatch(file.path))]
        if len(flat) == len(images):
            return _flat(split, flat, meaning), {}
    expected = f"the {len(meaning.folders)} class folders of {split.labels}, such as {next(iter(meaning.folders))}"
    cure = "correct path or labels of the split" + (
        "; for some of ImageNet's classes, name them in classes.names" if split.labels == "imagenet" else ""
    )
    tops = sorted({"/".join(parts[:depth]) for _, parts in placed})
    if len(tops) > 1:
        raise DataError(
            split.path,
            got=f"class folders in {few(tops)}",
            expected="one folder of class folders",
            cure="name one of them as path",
        )
    have = Counter(parts[depth] for _, parts in placed)
    missing = [folder for folder in meaning.folders if folder not in have] if meaning.whole or not placed else []
    others = Counter(
        "/".join(parts[:-1][: depth + 1]) or "no folder"
        for _, parts in images
        if len(parts) <= depth + 1 or parts[depth] not in known
    )
    problems = [f"{len(meaning.folders) - len(missing)} of {len(meaning.folders)} class folders"] if missing else []
    problems += [f"{few(missing)} without {modality}s"] if missing else []
    problems += [f"{sum(others.values())} {modality}s in {few(sorted(others))}"] if others else []
    if problems:
        raise DataError(split.path, got=", ".join(problems), expected=expected, cure=cure)
    other = [file.path for file in rest if splitext(file.path)[1].lower() not in suffixes]
    names = [path for path in other if (parts := path.split("/"))[:-1][depth : depth + 1] and parts[depth] in known]
    if names:
        raise DataError(
            split.path,
            got=f"{few(names)}, no {modality}s by their names",
            expected=" ".join(sorted(suffixes)),
            cure="convert, rename or remove them",
        )
    counts = {
        f"files that are not {modality}s": len(files) - len(images),
        "folders without a class": len(have.keys() & meaning.unmapped),
        "images in folders without a class": sum(have[folder] for folder in meaning.unmapped),
    }
    items = [
        Item(meaning.folders[parts[depth]], "/".join(parts[depth:]), file)
        for file, parts in placed
        if parts[depth] in meaning.folders
    ]
    return items, {what: count for what, count in counts.items() if count}


def _flat(split: FilesSplit, flat: Sequence[tuple[re.Match[str], File]], meaning: Meaning) -> list[Item]:
    """ImageNet's validation set without folders, as published: the n-th image has the n-th label of the kit."""
    if split.devkit is None:
        raise DataError(
            split.path,
            got=f"{len(flat)} images such as {flat[0][1].path} without class folders",
            expected="labels for them",
            cure="name ILSVRC2012_devkit_t12.tar.gz as `devkit` of the split",
        )
    truth = read_devkit(Path(split.devkit))
    numbers = sorted(int(match[1]) for match, _ in flat)
    if numbers != list(range(1, len(truth) + 1)):
        raise DataError(
            split.path,
            got=f"{len(flat)} images, numbers {numbers[0]} to {numbers[-1]}",
            expected=f"{len(truth)}, one a line of the development kit",
            cure="get the archive again",
        )
    strange = sorted(set(truth) - meaning.folders.keys())
    if strange:
        raise DataError(
            split.devkit,
            got=f"labels {few(strange)}",
            expected="classes of the head",
            cure="set classes.names: imagenet",
        )
    items = []
    for match, file in flat:
        wnid = truth[int(match[1]) - 1]
        items.append(Item(meaning.folders[wnid], f"{wnid}/{PurePosixPath(file.path).name}", file))
    return items


def _check_keys(split: OnDisk, container: Tars, examples: Mapping[str, Example[File]]) -> None:
    """Give a notice of keys that come in several shards; where their contents are the same too, a shard is a copy.

    Raises:
        DataError: the same image or text under the same key in two shards.
    """
    modality = modality_of(split)
    by_key: defaultdict[str, list[File]] = defaultdict(list)
    for key, (content, _) in examples.items() if len(container.paths) > 1 else ():
        if content is not None:
            by_key[key.partition("/")[2]].append(content)
    repeated = {key: files for key, files in by_key.items() if len(files) > 1}
    for key, files in repeated.items():
        equal = defaultdict(list)
        for file in files:
            if sum(other.size == file.size for other in files) > 1:
                equal[container.read(file)].append(file.path)
        if copies := next((paths for paths in equal.values() if len(paths) > 1), None):
            raise DataError(
                split.path,
                got=f"the same {modality} under the key {key} in {few(copies)}",
                expected="every example once",
                cure="remove the copies of shards",
            )
    if repeated:
        notice(
            "shards",
            f"{len(repeated)} keys such as {next(iter(repeated))} come in several of them, as other {modality}s",
        )


def by_key(split: OnDisk, container: Tars, files: Sequence[File], meaning: Meaning) -> list[Item]:
    """The examples of webdataset shards."""
    folders, modality = list(meaning.folders), modality_of(split)
    examples = pair(container.place, ((file.path, file) for file in files), container.read, modality)
    _check_keys(split, container, examples)
    labels = {key: example.label_below(len(folders)) for key, example in examples.items()}
    wrong = sorted(key for key, label in labels.items() if label is None)
    if wrong:
        content, text = examples[wrong[0]]
        article = "no" if content is None else "an" if modality == "image" else "a"
        raise DataError(
            split.path,
            got=f"{len(wrong)} examples such as {wrong[0]}, {article} {modality} with label {text}",
            expected=f"{'an image' if modality == 'image' else 'a text'} and a label from 0 to {len(folders) - 1}",
            cure=f"correct labels: {split.labels}, or make the shards again",
        )
    return [
        Item(label, f"{folders[label]}/{key}", content)
        for key, (content, _) in examples.items()
        if content is not None and (label := labels[key]) is not None
    ]


def _by_row(split: FilesSplit, rows: Rows, files: Sequence[File], meaning: Meaning) -> list[Item]:
    """The rows of a folder of the library `datasets`: labels by name where names are known, else by number."""
    numbers, names = rows.labels()
    folders = list(meaning.folders)
    label_of: Mapping[int, int] = {i: i for i in range(len(folders))}
    if names is not None:
        plain = {name: i for i, name in enumerate(meaning.names)}
        for known in (meaning.folders, plain):
            if set(names) <= known.keys():
                label_of = {i: known[name] for i, name in enumerate(names)}
                break
        else:
            raise DataError(
                split.path,
                got=f"{len(names)} labels such as {few(sorted(set(names) - plain.keys()))}",
                expected=f"names or folders of the {len(folders)} labels of {split.labels}",
                cure="correct labels of the split, or classes.names; labels that count them in their order may be "
                "plain integers",
            )
    wrong = [row for row, number in enumerate(numbers) if number not in label_of]
    if wrong:
        raise DataError(
            split.path,
            got=f"{len(wrong)} rows such as {wrong[0]} with label {numbers[wrong[0]]}",
            expected=f"labels from 0 to {len(label_of) - 1}",
            cure=f"correct labels: {split.labels}, or drop the rows",
        )
    items = []
    for file, number in zip(files, numbers, strict=True):
        label = label_of[number]
        items.append(Item(label, f"{folders[label]}/{file.path}", file))
    return items


def _cut(split: OnDisk, items: Sequence[Item], count: int, meaning: Meaning) -> list[Item]:
    """The part of a training set: of every class, the `count` examples whose names' sha256 is smallest are held out."""
    classes: defaultdict[int, list[Item]] = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    small = [label for label, found in classes.items() if len(found) <= count]
    if small:
        folder = list(meaning.folders)[small[0]]
        raise DataError(
            split.path,
            got=f"{len(classes[small[0]])} {modality_of(split)}s of {folder} and {len(small)} such classes",
            expected=f"more than prepare.held_out_per_class, {count}",
            cure=f"lower it, or add {modality_of(split)}s",
        )
    chosen = []
    for label in sorted(classes):
        drawn = sorted(classes[label], key=lambda item: hashlib.sha256(item.name.encode()).digest())
        chosen += drawn[:count] if split.part == "held-out" else drawn[count:]
    return chosen


@contextmanager
def readable(split: OnDisk) -> Iterator[None]:
    """What the system refuses of a split's source in the block, as one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            error.filename or split.path,
            got=error.strerror or error,
            expected="a source that can be read",
            cure="correct its rights or the split's path",
        ) from error


def listed(name: str, split: OnDisk) -> tuple[Container, list[File]]:
    """A split's container and its files.

    Raises:
        DataError: also what the system refuses, a path that comes twice, or one that is no text.
    """
    with readable(split):
        container = open_container(Path(split.path), split.password if isinstance(split, FilesSplit) else None)
        files = list(progress_bar(container.files(), desc=f"{name}: listing", unit="file", delay=2, leave=False))
    times = Counter(file.path for file in files)
    twice = sorted(path for path, count in times.items() if count > 1)
    if twice:
        raise DataError(
            split.path,
            got=f"{len(twice)} paths that come more than once, such as {twice[0]}",
            expected="every path once",
            cure="unpack it, which keeps the last of each, and name the folder, or make the archive again",
        )
    strange = [path for path in times if _STRANGE.search(path)]
    if strange:
        raise DataError(
            split.path,
            got=f"{len(strange)} names such as {strange[0]!a}",
            expected="UTF-8 without control characters",
            cure="rename them",
        )
    return container, files


def open_source(name: str, params: PrepareParams, classes: ClassesParams) -> Source:
    """List the images of a split on disk, by label and then by name.

    Raises:
        DataError: a path, label or member that is not as it should be.
        ParamsError: a layout that is not known.
    """
    split = params.splits[name]
    assert isinstance(split, FilesSplit)
    layout_of(split)  # before anything is read
    container, files = listed(name, split)
    whole = params.role(name) in ("train", "held-out")
    found = meaning(split, classes, _mappings(split, container, files), whole=whole)
    left_out: dict[str, int] = {}
    shards = False
    if isinstance(container, Tars) and any(file.path.endswith(".cls") for file in files):
        shards = True
        items = by_key(split, container, files, found)
    elif isinstance(container, Rows):
        items = _by_row(split, container, files, found)
    else:
        items, left_out = by_folder(split, files, found)
    return Source(container, part_of(split, items, params.held_out_per_class, found), found, left_out, shards)


def part_of(split: OnDisk, items: list[Item], held_out_per_class: int, meaning: Meaning) -> list[Item]:
    """The part of all examples that the split wants, by label and then by name.

    Raises:
        DataError: no examples, or none of a label that must have some.
    """
    present, noun = {item.label for item in items}, f"{modality_of(split)}s"
    if not items or (meaning.whole and len(present) < len(meaning.names)):
        missing = [folder for folder, label in meaning.folders.items() if label not in present]
        raise DataError(
            split.path,
            got=f"{len(items)} {noun}, none of {few(missing)}",
            expected=f"{noun} of all {len(meaning.names)} labels",
            cure="correct path or labels of the split",
        )
    if split.part != "all":
        items = _cut(split, items, held_out_per_class, meaning)
    return sorted(items, key=lambda item: (item.label, item.name))


def subset(source: Source) -> Source:
    """The source with only the labels that it has images of, in their order."""
    present = sorted({item.label for item in source.items})
    if len(present) == len(source.meaning.names):
        return source
    place: dict[int, int] = {label: i for i, label in enumerate(present)}
    kept: Any = {f: place[label] for f, label in source.meaning.folders.items() if label in place}
    names = [source.meaning.names[label] for label in present]
    groups = [source.meaning.groups[label] for label in present]
    items = [item._replace(label=place[item.label]) for item in source.items]
    return replace(source, items=items, meaning=replace(source.meaning, folders=kept, names=names, groups=groups))
