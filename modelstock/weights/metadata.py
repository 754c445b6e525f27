"""What a weight set's metadata may hold: a file says whatever its writer liked, and is asked before it is believed."""

import math
from collections.abc import Mapping
from typing import Any

TEXTS = ("clip", "classes_sha256", "of")
LISTS = ("classes", "parents", "notices")  # of texts
MAPPINGS = ("architecture", "backbone", "made_by", "preprocess")
RESIZE_MODES = ("shortest", "longest", "squash")
LARGEST = 4096  # pixels of an image's side


def problem_of(meta: Any) -> str | None:
    """What is not as it should be in metadata; None where nothing is."""
    if not isinstance(meta, dict):
        return f"metadata that are a {type(meta).__name__}"
    for name, value in meta.items():
        if name in TEXTS and not isinstance(value, str):
            return f"{name} that is a {type(value).__name__}"
        if name in LISTS and not _texts(value):
            return f"{name} that are no list of texts"
        if name in MAPPINGS and not isinstance(value, Mapping):
            return f"{name} that is a {type(value).__name__}"
    if "preprocess" in meta:
        return _problem_of_preprocess(meta["preprocess"])
    return None


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _problem_of_preprocess(preprocess: Mapping[str, Any]) -> str | None:
    size = preprocess.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size <= LARGEST:
        return f"preprocess.size {str(size)[:40]}, which is no number from 1 to {LARGEST}"
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        values = preprocess.get(name)
        if not isinstance(values, list) or len(values) != 3 or not all(_number(v) and v > least for v in values):
            return f"preprocess.{name} {str(values)[:40]}, which are not three numbers" + " above 0" * (name == "std")
    if not isinstance(preprocess.get("interpolation"), str):
        return "preprocess without interpolation"
    mode = preprocess.get("resize_mode", RESIZE_MODES[0])
    return None if mode in RESIZE_MODES else f"preprocess.resize_mode {str(mode)[:40]}"


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
