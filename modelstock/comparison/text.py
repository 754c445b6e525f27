"""Figures of a comparison as text, and tables in Markdown."""

import re
from collections.abc import Sequence

from modelstock.comparison.intervals import Estimate


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def half(estimate: Estimate) -> str:
    """A share in percent, with half its interval."""
    return f"{percent(estimate.value)} ± {percent((estimate.high - estimate.low) / 2)}"


def with_half(estimate: Estimate) -> str:
    """The same, with † where the interval is not over seeds."""
    return half(estimate) + ("" if estimate.over.startswith("seeds") else "†")


def signed(estimate: Estimate) -> str:
    """A difference in points, with its interval."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def worded(text: str, modality: str) -> str:
    """A text about images as one about the examples at hand, but for what stands between backquotes."""
    if modality == "image":
        return text
    words = {"an image": "a text", "image": "text", "images": "texts", "Image": "Text", "Images": "Texts"}
    return re.sub(r"`[^`]*`|\b(?:an image|[Ii]mages?)\b", lambda match: words.get(match[0], match[0]), text)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left, all others to the right."""
    rows = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(rows + ["| " + " | ".join(cells) + " |" for cells in body])
