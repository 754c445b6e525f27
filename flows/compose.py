"""params.yaml from conf/, with the comments: `python -m flows.compose`, or `python -m flows.compose vit-b-32`.

`dvc exp run -S preset=vit-b-32` composes the same values through Hydra, without comments.
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from modelstock.files import atomic_path
from modelstock.params import Params

NULL = "tag:yaml.org,2002:null"
HEAD = """\
# Everything that can be set, composed from conf/ by `python -m flows.compose`: change it there, not here, for every
# `dvc exp run` without --no-hydra composes it again. The embedded benchmark's sizes and recipe were chosen once, so
# that fine-tuning lifts in-distribution accuracy and costs shift accuracy as on ImageNet.
"""


def lay_over(base: CommentedMap, over: CommentedMap) -> None:
    """Put `over` on `base`, section by section, each value with the comment behind it."""
    for key, value in over.items():
        if isinstance(value, CommentedMap) and isinstance(base.get(key), CommentedMap):
            lay_over(base[key], value)
            continue
        base[key] = value
        base.ca.items.pop(key, None)
        if key in over.ca.items:
            base.ca.items[key] = over.ca.items[key]


def composed(file: Path, conf: Path) -> CommentedMap:
    """A file of `conf` over those that its `defaults` name, as Hydra composes them."""
    own = YAML().load(file.read_text(encoding="utf-8"))
    result = CommentedMap()
    for entry in own.pop("defaults", []):
        if entry != "_self_":
            folder = conf if entry.startswith("/") else file.parent
            lay_over(result, composed(folder / f"{entry.lstrip('/')}.yaml", conf))
    lay_over(result, own)
    return result


def text_of(preset: str, conf: Path) -> str:
    """The params file of a preset: its sections in the order of Params, with a line between them."""
    values = composed(conf / "preset" / f"{preset}.yaml", conf)
    yaml = YAML()
    yaml.width = 120
    yaml.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(NULL, "null"))
    blocks: list[str] = []
    for key in Params.model_fields:
        section = CommentedMap({key: values[key]})
        if key in values.ca.items:
            section.ca.items[key] = values.ca.items[key]
        stream = io.StringIO()
        yaml.dump(section, stream)
        lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
        blocks.append("\n" * isinstance(values[key], CommentedMap) + "\n".join(lines) + "\n")
    return HEAD + "".join(blocks)


def main(preset: Annotated[str, typer.Argument(help="One of conf/preset.")] = "shapes") -> None:
    """Write params.yaml from conf/."""
    with atomic_path(Path("params.yaml")) as temporary:
        temporary.write_text(text_of(preset, Path("conf")), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
