"""What heads and towers need to know of the embedded benchmark: its classes, its prompts, and how its images are taken.

How the pictures are drawn is in `render`, which nothing but drawing depends on.
"""

from typing import Any

# The classes, in the order of a head.
NAMES = (
    "arrow",
    "bow tie",
    "chevron",
    "crescent",
    "cross",
    "diamond",
    "disc",
    "drop",
    "ell",
    "flower",
    "frame",
    "gear",
    "half disc",
    "heart",
    "hexagon",
    "hourglass",
    "house",
    "pentagon",
    "ring",
    "saltire",
    "square",
    "star",
    "tee",
    "triangle",
)
TEMPLATES = ("a photo of a {}.", "a sketch of a {}.", "a cartoon of a {}.", "{}")
# How the tiny CLIP and the reference model take these images.
TINY_PREPROCESS: dict[str, Any] = {
    "size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
}
