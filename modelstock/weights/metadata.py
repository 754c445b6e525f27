"""What a weight set's metadata may hold: a file says whatever its writer liked, and is asked before it is believed."""

import math
from collections.abc import Mapping
from typing import Any

TEXTS = ("clip", "classes_sha256", "of")
LISTS = ("classes", "parents", "notices")  # of texts
MAPPINGS = ("architecture", "backbone", "made_by", "preprocess")
RESIZE_MODES = ("shortest", "longest", "squash")
LARGEST = 4096  # pixels of an image's side
LONGEST = 1 << 16  # tokens of a text
CLEANINGS = ("none", "whitespace", "lower", "canonicalize")  # of a text before it is cut into tokens, as open_clip's
PADDINGS = ("longest", "length")  # to the longest of a batch, or always to `length`


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


def readable(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for people: without the file of a tokenizer, which its sha256 identifies."""
    preprocess = meta.get("preprocess")
    tokenizer = preprocess.get("tokenizer") if isinstance(preprocess, Mapping) else None
    if not isinstance(tokenizer, Mapping):
        return dict(meta)
    short = {name: value for name, value in tokenizer.items() if name != "json"}
    return {**meta, "preprocess": {**preprocess, "tokenizer": short}}  # type: ignore[dict-item]


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _problem_of_preprocess(preprocess: Mapping[str, Any]) -> str | None:
    if preprocess.get("modality", "image") == "text":
        return _problem_of_texts(preprocess)
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


def _problem_of_texts(preprocess: Mapping[str, Any]) -> str | None:
    length, pad = preprocess.get("length"), preprocess.get("pad")
    if not isinstance(length, int) or isinstance(length, bool) or not 0 < length <= LONGEST:
        return f"preprocess.length {str(length)[:40]}, which is no number from 1 to {LONGEST}"
    if not isinstance(pad, int) or isinstance(pad, bool) or pad < 0:
        return f"preprocess.pad {str(pad)[:40]}, which is no token"
    if preprocess.get("padding") not in PADDINGS:
        return f"preprocess.padding {str(preprocess.get('padding'))[:40]}, which is not {' or '.join(PADDINGS)}"
    if preprocess.get("cleaning") not in CLEANINGS:
        return f"preprocess.cleaning {str(preprocess.get('cleaning'))[:40]}, which is not {', '.join(CLEANINGS)}"
    tokenizer = preprocess.get("tokenizer")
    if not isinstance(tokenizer, Mapping) or not all(isinstance(value, str) for value in tokenizer.values()):
        return "preprocess.tokenizer that is no mapping of texts"
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
