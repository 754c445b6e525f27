"""How a weight set was made, for its metadata: the one place that spells its keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from modelstock import __version__


def made_by(*, stage: str, options: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """The entry `made_by` of a weight set's metadata: the stage, its options, and this library's version.

    `facts`: whatever else applies, as JSON: seed, method, granularity, members, source, average, key, files.
    """
    return {"stage": stage, **facts, "options": dict(options), "version": __version__}


def with_notices(notices: Sequence[str]) -> dict[str, list[str]]:
    """The metadata entry for what was unusual while a weight set was made; nothing where nothing was."""
    return {"notices": list(notices)} if notices else {}


def inherited(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a descendant takes over of a weight set's metadata: all but the notices, which are about that one."""
    return {key: value for key, value in meta.items() if key != "notices"}
