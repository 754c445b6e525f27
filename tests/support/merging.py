"""Merges in memory and of files with options as keywords, as tests like to write them."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from modelstock.merging.engine import merge
from modelstock.merging.files import merge_files


def _with_options(function: Callable[..., Any], *arguments: Any, **words: Any) -> Any:
    """Call a merge, every keyword that is none of its parameters being an option of the method."""
    known = signature(function).parameters
    options = {name: value for name, value in words.items() if name not in known}
    return function(*arguments, options=options, **{name: value for name, value in words.items() if name in known})


def merge_with(method: str, anchor: Any, tuned: Any, **words: Any) -> Any:
    """`merge`, with the method's options as keywords."""
    return _with_options(merge, method, anchor, tuned, **words)


def merge_files_with(method: str, anchor: Any, tuned: Any, out: Any, **words: Any) -> Any:
    """`merge_files`, with the method's options as keywords."""
    return _with_options(merge_files, method, anchor, tuned, out, **words)
