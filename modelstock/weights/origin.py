"""How a weight set was made, for its metadata: the one place that spells its keys."""

from collections.abc import Mapping
from typing import Any

from modelstock import __version__


def made_by(*, stage: str, options: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """The entry `made_by` of a weight set's metadata: the stage, its options, and this library's version.

    `facts`: whatever else applies, as JSON: seed, method, granularity, members, source, average, key, files.
    """
    return {"stage": stage, **facts, "options": dict(options), "version": __version__}
