"""What dvc.lock says of a stage's outputs, and what to do about a damaged one.

DVC links an output and its own copy of it to the same bytes on disk, so both are damaged at once, and running the stage
again would bring the damaged copy back: both have to go.
"""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

CACHE = Path(".dvc/cache/files/md5")


def cure_of(path: Path, otherwise: str) -> str:
    """What replaces the damaged file `path`, by dvc.lock here; `otherwise`: for what is no output of a stage."""
    with suppress(Exception):  # whatever is wrong with dvc.lock is not what is reported
        for stage, out in _outputs():
            if path == Path(out["path"]) or Path(out["path"]) in path.parents:
                copies = [place for place in _copies(path, out) if place.is_file()]
                files = " ".join(shlex.quote(str(file)) for file in [path, *copies])
                return f"remove it with DVC's copy of it and make it again: rm -f {files}; dvc repro {stage}"
    return otherwise


def in_cache(path: Path) -> bool:
    """Whether `path` is an output in dvc.lock that DVC's cache here holds."""
    with suppress(Exception):
        return any(
            path == Path(out["path"]) and (CACHE / out["md5"][:2] / out["md5"][2:]).is_file() for _, out in _outputs()
        )
    return False


def _outputs() -> list[tuple[str, dict[str, Any]]]:
    """(stage, output) of everything in dvc.lock."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(Path("dvc.lock").read_text(encoding="utf-8"))["stages"]
    return [(name, out) for name, stage in stages.items() for out in stage.get("outs", [])]


def _copies(path: Path, out: dict[str, Any]) -> list[Path]:
    """DVC's copy of a file: the output itself, or a file in the folder that is the output."""
    own = CACHE / out["md5"][:2] / out["md5"][2:]
    if path == Path(out["path"]):
        return [own]
    inside = path.relative_to(out["path"]).as_posix()
    entries = json.loads(own.read_text(encoding="utf-8"))
    return [CACHE / e["md5"][:2] / e["md5"][2:] for e in entries if e["relpath"] == inside]
