"""Weight sets as folders that the library of their tower loads, with the fine-tuned head and a model card.

What is written for a kind of towers is a row of FORMATS.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstock.errors import ParamsError, WeightsError
from modelstock.models import export_clip, export_timm, export_transformers
from modelstock.models.card import Kind, card, figures_of
from modelstock.models.towers import kind_of
from modelstock.weights.weight_set import WeightSet, classes_sha256

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Format:
    """How weight sets of a kind of towers are exported.

    `card`: what the card says of them. `clip`: whether the CLIP is needed that the anchor was made of. `write`:
    weights, CLIP, class names and a new folder -> the files, all but the card. `example`: weights and the folder's name
    -> lines of Python that classify. `notes`: lines about the files. `loads`: Python that loads {folder}.
    """

    card: Kind
    clip: bool
    write: Callable[[WeightSet, WeightSet | None, Sequence[str], Path], None]
    example: Callable[[WeightSet, str], list[str]]
    notes: Callable[[WeightSet], list[str]]
    loads: str


_CLIP = 'open_clip.create_model_and_transforms("local-dir:{folder}")'
# By the kind of their tower; see modelstock.models.towers.TOWERS.
FORMATS = {
    "open_clip": Format(
        card=Kind(
            library="open_clip",
            task="image-classification",
            noun="An image classifier",
            inputs="images",
            tags=["clip"],
        ),
        clip=True,
        write=export_clip.write,
        example=export_clip.image_example,
        notes=export_clip.notes,
        loads=_CLIP,
    ),
    "open_clip-text": Format(
        card=Kind(
            library="open_clip", task="text-classification", noun="A text classifier", inputs="texts", tags=["clip"]
        ),
        clip=True,
        write=export_clip.write,
        example=export_clip.text_example,
        notes=export_clip.notes,
        loads=_CLIP,
    ),
    "transformers": Format(
        card=Kind(library="transformers", task="text-classification", noun="A text classifier", inputs="texts"),
        clip=False,
        write=export_transformers.write,
        example=export_transformers.example,
        notes=export_transformers.notes,
        loads='transformers.AutoModel.from_pretrained("{folder}")',
    ),
    "timm": Format(
        card=Kind(
            library="timm", task="image-classification", noun="An image classifier", inputs="images", tags=["timm"]
        ),
        clip=False,
        write=export_timm.write,
        example=export_timm.example,
        notes=export_timm.notes,
        loads='timm.create_model("local-dir:{folder}", pretrained=True)',
    ),
}


def export(
    weights: WeightSet,
    clip: WeightSet | None,
    folder: Path,
    *,
    report: Mapping[str, Any] | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write a weight set as a folder that its tower's library loads; Python that does so.

    With it go the head, the classes' names and a model card. `clip`: of towers of open_clip, the CLIP with both towers
    that the anchor was made of. `report`: the comparison's JSON, whose figures for these weights go on the card.
    `licence`: an identifier as the hub knows them. Whole or not at all.

    Raises:
        WeightsError: weights that do not descend from the clip, or do not name their classes.
        DataError: a report without these weights.
        ParamsError: a folder that exists; a clip where there should be none, or none where there should be one.
    """
    if "architecture" not in weights.meta or not {"head.weight", "head.bias"} <= weights.tensors.keys():
        raise WeightsError(
            weights.source,
            got="a file without architecture or head",
            expected="a weight set made by modelstock",
            cure="make it with the stages, or `modelstock merge`",
        )
    kind_of(weights)
    name = weights.meta["architecture"].get("kind", "open_clip")
    if name not in FORMATS:
        raise WeightsError(weights.source, got=f"a tower of {name}", expected=", ".join(FORMATS), cure="name another")
    form = FORMATS[name]
    if form.clip and clip is None:
        cure = "name the file of `modelstock anchor --clip-out`"
        raise ParamsError("--clip", got="none", expected="the CLIP that the anchor was made of", cure=cure)
    if clip is not None and not form.clip:
        raise ParamsError("--clip", got=clip.source, expected=f"none for a tower of {name}", cure="leave it out")
    names = _class_names(weights)
    figures = () if report is None else figures_of(report, weights)
    weights.check_finite()
    title = Path(folder).absolute().name
    with _whole_folder(folder, overwrite) as new:
        form.write(weights, clip, names, new)
        text = card(
            weights,
            title,
            kind=form.card,
            example=form.example(weights, title),
            notes=form.notes(weights),
            figures=figures,
            licence=licence,
        )
        (new / CARD).write_text(text, encoding="utf-8")
    return form.loads.replace("{folder}", str(folder))


def _class_names(weights: WeightSet) -> tuple[str, ...]:
    """The names of a head's classes, in order.

    Raises:
        WeightsError: they are not recorded, or are not those that the head was made for.
    """
    names, count = tuple(weights.meta.get("classes", ())), len(weights.tensors["head.weight"])
    if len(names) != count or weights.meta.get("classes_sha256") != classes_sha256(names):
        raise WeightsError(
            weights.source,
            got=f"{len(names)} class names for a head of {count}",
            expected="a weight set that names its classes",
            cure="make its anchor again with this version",
        )
    return names


def _is_export(folder: Path) -> bool:
    card = folder / CARD
    return card.is_file() and b"modelstock" in card.read_bytes()


@contextmanager
def _whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a sibling folder that takes the place of `folder` when everything in it is written, else vanishes.

    Raises:
        ParamsError: the folder exists, and is not to be overwritten or is no export.
    """
    folder = Path(os.path.abspath(folder))
    exists = folder.exists() or folder.is_symlink()
    if exists and not overwrite:
        raise ParamsError(
            folder, got="something that exists", expected="a new folder", cure="name another, or --overwrite"
        )
    if exists and not (folder.is_dir() and (_is_export(folder) or not any(folder.iterdir()))):
        raise ParamsError(
            folder, got="something that is no export", expected=f"a folder with {CARD} of one", cure="name another"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in sorted(path for path in new.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if exists:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if exists:
                os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
