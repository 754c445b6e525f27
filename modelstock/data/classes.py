"""What a head tells apart: class names, the folders they stand in on disk, and the prompts of a zero-shot start."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from modelstock.data.shapes.names import NAMES, TEMPLATES
from modelstock.params import ClassesParams


def wnids(name: str = "imagenet") -> list[str]:
    """The WordNet ids of ImageNet's 1000 classes, class i being the i-th in order, or of the 200 of -A or -R.

    Source: timm's tables of them.
    """
    timm = find_spec("timm")  # its files only: importing it costs seconds
    return (
        (Path(str(timm and timm.origin)).parent / f"data/_info/{name.replace('-', '_')}_synsets.txt")
        .read_text()
        .split()
    )


def class_names(params: ClassesParams) -> list[str]:
    """The head's classes in order, as prompts name them; ImageNet's are OpenAI's, as open_clip has them."""
    if params.names == "imagenet":
        import open_clip

        return list(open_clip.IMAGENET_CLASSNAMES)
    if params.names == "shapes":
        return list(NAMES)
    return list(params.names.values()) if isinstance(params.names, dict) else list(params.names)


def folder_names(params: ClassesParams) -> list[str]:
    """The folder that holds each class's images, in the same order."""
    if params.names == "imagenet":
        return wnids()
    return list(params.names) if isinstance(params.names, dict) else class_names(params)


def templates(params: ClassesParams) -> Sequence[Callable[[str], str]]:
    """Class name -> prompt, each of them."""
    if params.templates == "openai":
        import open_clip

        found: Sequence[Callable[[str], str]] = open_clip.OPENAI_IMAGENET_TEMPLATES
        return found
    if isinstance(params.templates, dict):
        own = params.templates
        return [partial(_own_text, own, place) for place in range(len(next(iter(own.values()))))]
    texts = TEMPLATES if params.templates == "shapes" else params.templates
    return [partial(str.format, text) for text in texts]


def _own_text(texts: Mapping[str, Sequence[str]], place: int, name: str) -> str:
    return texts[name][place]


def prompts_key(names: Sequence[str], prompts: Sequence[Callable[[str], str]]) -> str:
    """What identifies a zero-shot head's texts, in their order."""
    return json.dumps([prompt(name) for name in names for prompt in prompts])
