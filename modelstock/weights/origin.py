"""How a weight set was made, for its metadata: the one place that spells its keys."""

from collections.abc import Iterable, Mapping
from typing import Any

from modelstock import __version__


def made_by(*, stage: str, options: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """The entry `made_by` of a weight set's metadata: the stage, its options, and this library's version.

    `facts`: whatever else applies, as JSON: seed, method, granularity, members, source, average, key, files.
    """
    return {"stage": stage, **facts, "options": dict(options), "version": __version__}


def kept_notices(*groups: Iterable[str]) -> dict[str, list[str]]:
    """The metadata entry for what was unusual about a weight set and its ancestors; nothing where nothing was."""
    lines = list(dict.fromkeys(line for group in groups for line in group))
    return {"notices": lines} if lines else {}


def notices_of(meta: Mapping[str, Any]) -> list[str]:
    """What was unusual about a weight set and its ancestors."""
    return list(meta.get("notices", []))
