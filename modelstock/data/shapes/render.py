"""The embedded benchmark `shapes`: a procedural stand-in for ImageNet and its five shifts.

24 classes of objects drawn at 32x32 with nuisance of pose, colour, texture, background and noise. Image `index` of
a split depends on (seed, split, index) alone, so any part of it can be drawn again, in any order and batch size.
The pictures are signed distance fields evaluated for a whole batch at once.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.data.shapes.names import NAMES

Float = NDArray[Any]  # float32, but numpy's types widen at every product with a Python float
Drawn = tuple[NDArray[np.uint8], int]  # an image (32, 32, 3), and its label
SIZE = 32
BLOCK = 500  # images that are drawn at a time


def _polygon(sides: int) -> Callable[[Float, Float], Float]:
    """A regular polygon of inradius 0.8 that stands on a side."""
    angles = -np.pi / 2 + 2 * np.pi * np.arange(sides) / sides
    normals = [(float(np.cos(a)), float(np.sin(a))) for a in angles]
    return lambda x, y: np.max([x * a + y * b for a, b in normals], axis=0) - (0.55 if sides == 3 else 0.8)


def _polar(radius: Callable[[Float], Float]) -> Callable[[Float, Float], Float]:
    """A shape whose border lies at `radius(angle)`, angle 0 pointing up."""
    return lambda x, y: np.hypot(x, y) - radius(np.arctan2(x, y))


def _box(x: Float, y: Float, width: float, height: float, at: tuple[float, float] = (0, 0)) -> Float:
    return np.maximum(np.abs(x - at[0]) - width, np.abs(y - at[1]) - height)


def _any(*fields: Float) -> Float:
    result: Float = np.minimum.reduce(fields)
    return result


def _all(*fields: Float) -> Float:
    result: Float = np.maximum.reduce(fields)
    return result


def _turned(field: Callable[[Float, Float], Float]) -> Callable[[Float, Float], Float]:
    half = np.float32(np.sqrt(0.5))
    return lambda x, y: field((x + y) * half, (y - x) * half)


def _cross(x: Float, y: Float) -> Float:
    return _any(_box(x, y, 0.95, 0.28), _box(x, y, 0.28, 0.95))


# Each field is negative inside the object, zero on its border, and about the distance to it elsewhere;
# objects span about [-1, 1] in both directions, y pointing up.
CLASSES: dict[str, Callable[[Float, Float], Float]] = {
    "arrow": lambda x, y: _any(
        _all(_box(x, y, 1, 0.45, (0, 0.45)), (np.abs(x) + y - 0.95) * 0.75), _box(x, y, 0.25, 0.6, (0, -0.4))
    ),
    "bow tie": lambda x, y: _all(_box(x, y, 0.95, 0.75), (np.abs(y) - np.abs(x) * 0.75 - 0.08) * 0.8),
    "chevron": lambda x, y: _all(_box(x, y, 0.95, 1), (np.abs(y + np.abs(x) * 0.8 - 0.4) - 0.35) * 0.8),
    "crescent": lambda x, y: _all(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.45, y)),
    "cross": _cross,
    "diamond": lambda x, y: (np.abs(x) * 1.25 + np.abs(y) - 0.98) * 0.65,
    "disc": lambda x, y: np.hypot(x, y) - 0.88,
    "drop": _polar(lambda a: 0.6 + 0.36 * np.exp(-((a / 0.42) ** 2))),
    "ell": lambda x, y: _any(_box(x, y, 0.28, 0.95, (-0.5, 0)), _box(x, y, 0.78, 0.28, (0, -0.67))),
    "flower": _polar(lambda a: 0.68 + 0.25 * np.cos(5 * a)),
    "frame": lambda x, y: np.abs(_box(x, y, 0.7, 0.7)) - 0.16,
    "gear": _polar(lambda a: 0.78 + 0.16 * np.tanh(4 * np.cos(8 * a))),
    "half disc": lambda x, y: _all(np.hypot(x, y + 0.4) - 0.95, -y - 0.4),
    "heart": lambda x, y: (np.hypot(x, 1.2 * (y + 0.1) - 0.75 * np.sqrt(np.abs(x) + 1e-3)) - 0.88) * 0.8,
    "hexagon": _polygon(6),
    "hourglass": lambda x, y: _all(_box(x, y, 0.75, 0.95), (np.abs(x) - np.abs(y) * 0.75 - 0.08) * 0.8),
    "house": lambda x, y: _any(_box(x, y, 0.62, 0.5, (0, -0.42)), _all((np.abs(x) + y - 0.95) * 0.75, 0.05 - y)),
    "pentagon": _polygon(5),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.18,
    "saltire": _turned(_cross),
    "square": lambda x, y: _box(x, y, 0.8, 0.8),
    "star": _polar(lambda a: 0.66 + 0.3 * np.cos(5 * a) * (0.7 + 0.3 * np.cos(5 * a))),
    "tee": lambda x, y: _any(_box(x, y, 0.9, 0.27, (0, 0.65)), _box(x, y, 0.27, 0.9)),
    "triangle": lambda x, y: _polygon(3)(x, y + 0.25),
}
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.9, 0.85, 0.15),
    "purple": (0.6, 0.2, 0.75),
    "orange": (0.95, 0.55, 0.1),
    "black": (0.08, 0.08, 0.08),
    "white": (0.95, 0.95, 0.95),
}


@dataclass(frozen=True)
class Style:
    """How a picture is drawn. Angles in degrees, lengths in half frames, noise in grey levels of [0, 1]."""

    phrase: str  # how a caption calls it
    turn: tuple[float, float] = (0.0, 12.0)  # least and greatest rotation, either way
    size: tuple[float, float] = (0.70, 0.95)
    shift: float = 0.08
    stretch: float = 0.12  # aspect ratio and shear, relative
    noise: float = 0.10
    texture: float = 0.6  # share of objects with stripes or checks
    clutter: float = 0.25  # strength of the background's pattern
    cover: float = 0.2  # share of pictures with a bar across the object
    contrast: tuple[float, float] = (0.25, 0.6)
    outline: float = 0.0  # half width of a dark border; the object is filled
    drawing: bool = False  # grey outlines on paper, nothing filled


STYLES = {
    "photo": Style("photo"),
    "hard photo": Style("photo", turn=(0, 18), size=(0.6, 0.95), shift=0.12, noise=0.14, cover=0.35),
    "cartoon": Style("cartoon", noise=0.02, texture=0.1, clutter=0.1, cover=0, outline=0.09, stretch=0.2),
    "sketch": Style("sketch", noise=0.06, cover=0, outline=0.07, drawing=True, stretch=0.2),
    "odd view": Style("photo", turn=(12, 40), stretch=0.3, clutter=0.4, size=(0.65, 0.9)),
}


@dataclass(frozen=True)
class Split:
    """One set of images: its style, and how its labels relate to the 24 classes.

    `labels`: label name -> the class names it stands for; a subset of classes is a table without the others, a
    many-to-one mapping a table with longer lists.
    """

    style: str
    labels: Mapping[str, tuple[str, ...]]
    adversarial: bool = False


_EACH = {name: (name,) for name in NAMES}
_R = (
    "arrow",
    "bow tie",
    "crescent",
    "cross",
    "disc",
    "drop",
    "flower",
    "half disc",
    "heart",
    "house",
    "star",
    "tee",
)
_A = (
    "chevron",
    "diamond",
    "disc",
    "ell",
    "gear",
    "hexagon",
    "hourglass",
    "pentagon",
    "ring",
    "saltire",
    "square",
    "triangle",
)
_OBJECTS = {
    "box": ("square", "frame"),
    "wheel": ("disc", "ring", "gear"),
    "plus sign": ("cross", "saltire"),
    "letter": ("ell", "tee"),
    **{n: (n,) for n in ("arrow", "bow tie", "crescent", "diamond", "flower", "heart", "hourglass", "house", "star")},
}
SPLITS = {
    "train": Split("photo", _EACH),
    "held-out": Split("photo", _EACH),
    "shapes": Split("photo", _EACH),
    "shapes-v2": Split("hard photo", _EACH),
    "shapes-rendition": Split("cartoon", {n: (n,) for n in _R}),
    "shapes-sketch": Split("sketch", _EACH),
    "shapes-adversarial": Split("photo", {n: (n,) for n in _A}, adversarial=True),
    "shapes-objectnet": Split("odd view", _OBJECTS),
}
_WEB = (("photo", 0.2), ("hard photo", 0.1), ("cartoon", 0.2), ("sketch", 0.2), ("odd view", 0.3))
_DRAWS = 32  # uniform numbers a picture uses; a style that needs more must raise it, which redraws everything


def _random(seed: int, split: str, indices: Sequence[int]) -> tuple[Float, Float]:
    """Uniform numbers (B, 32) and standard normal noise (B, 32, 32, 3): one counter-based stream an image."""
    key = (seed << 32) | zlib.crc32(split.encode())
    uniform = np.empty((len(indices), _DRAWS), np.float32)
    noise = np.empty((len(indices), SIZE, SIZE, 3), np.float32)
    for row, index in enumerate(indices):
        stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, int(index), 0]))
        uniform[row] = stream.random(_DRAWS, np.float32)
        stream.standard_normal(dtype=np.float32, out=noise[row])
    return uniform, noise


def _render(classes: NDArray[np.int64], style: Style, uniform: Float, noise: Float, colour: Float) -> NDArray[np.uint8]:
    """Draw a batch in one style: classes (B,), uniforms (B, 32), noise (B, 32, 32, 3), colour (B, 3)."""
    u = iter(np.moveaxis(uniform[:, 8:, None, None], 1, 0))  # the first 8 numbers choose labels, style and colour

    def between(low: float, high: float) -> Float:
        number: Float = next(u)
        return low + (high - low) * number

    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / (SIZE / 2) - 1
    px, py = axis[None, None, :], -axis[None, :, None]
    angle = np.deg2rad(between(*style.turn)) * np.where(next(u) < 0.5, -1, 1)
    size = between(*style.size)
    dx, dy = (
        (px - between(-style.shift, style.shift)) / size,
        (py - between(-style.shift, style.shift)) / size,
    )
    x, y = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    x = x * (1 + between(-style.stretch, style.stretch)) + y * between(-style.stretch, style.stretch)
    distance = np.empty(np.broadcast_shapes(x.shape, y.shape), np.float32)
    for number in np.unique(classes):
        chosen = classes == number
        distance[chosen] = CLASSES[NAMES[number]](x[chosen], y[chosen])
    edge = 2 / SIZE / size  # one pixel
    inside = np.clip(0.5 - distance / edge, 0, 1)[..., None]
    border = np.clip(0.5 - (np.abs(distance) - style.outline) / edge, 0, 1)[..., None] * (style.outline > 0)

    frequency, phase, turn = between(3, 9), between(0, 6.3), between(0, 3.15)
    wave = np.cos(frequency * (np.cos(turn) * dx + np.sin(turn) * dy) + phase)[..., None]
    textured = (next(u) < style.texture)[..., None]
    frequency, phase, turn = between(1, 6), between(0, 6.3), between(0, 3.15)
    pattern = np.cos(frequency * (np.cos(turn) * px + np.sin(turn) * py) + phase)[..., None]
    slope = (px * between(-1, 1) + py * between(-1, 1))[..., None]
    # The background differs from the object by `contrast` in every channel, on a circle of brightness.
    back = (
        colour[:, None, None]
        + 0.5
        + (between(*style.contrast)[..., None] - 0.5) * np.where(next(u) < 0.5, -1, 1)[..., None]
    ) % 1
    fore = np.clip(colour[:, None, None] + textured * 0.22 * wave, 0, 1)
    back = np.clip(back + style.clutter * (0.5 * pattern + 0.5 * slope), 0, 1)
    if style.drawing:
        paper, ink = between(0.75, 1)[..., None], between(0, 0.35)[..., None]
        picture = paper + (ink - paper) * border + np.zeros(3, np.float32)
    else:
        picture = back + (fore - back) * inside
        picture = picture * (1 - border) + 0.08 * border
    bar_turn, bar_at = between(0, 3.15), between(-0.6, 0.6)
    bar = np.abs(np.cos(bar_turn) * px + np.sin(bar_turn) * py - bar_at) < between(0.06, 0.16)
    covered = (bar & (next(u) < style.cover))[..., None]
    picture = np.where(covered, 1 - colour[:, None, None][..., ::-1], picture)
    grain = noise.mean(axis=-1, keepdims=True) * np.sqrt(3) if style.drawing else noise
    return (np.clip(picture + style.noise * grain, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw(split: str, indices: Sequence[int], *, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (B, 32, 32, 3) uint8 and labels (B,) of a split; labels index `SPLITS[split].labels`.

    Adversarial splits are drawn like any other here; who keeps which is decided by a reference model.
    """
    plan = SPLITS[split]
    uniform, noise = _random(seed, split, indices)
    groups = [[NAMES.index(c) for c in group] for group in plan.labels.values()]
    labels = np.asarray(indices, np.int64) % len(groups)
    classes = np.array([groups[g][int(r * len(groups[g]))] for g, r in zip(labels, uniform[:, 0], strict=True)])
    colour = uniform[:, 1:4]
    return _render(classes, STYLES[plan.style], uniform, noise, colour), labels


def drawn(split: str, *, seed: int, start: int = 0) -> Iterator[Drawn]:
    """Images and labels of a split, without end, from index `start` on."""
    while True:
        yield from zip(*draw(split, range(start, start + BLOCK), seed=seed), strict=True)
        start += BLOCK


def web(indices: Sequence[int], *, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """Pre-training draws of all styles: images (B, 32, 32, 3), classes (B,), captions that name colour and style."""
    uniform, noise = _random(seed, "web", indices)
    classes = (uniform[:, 0] * len(NAMES)).astype(np.int64)
    edges = np.cumsum([share for _, share in _WEB])
    styles = np.minimum(np.searchsorted(edges, uniform[:, 1]), len(_WEB) - 1)
    named = (uniform[:, 2] * len(COLOURS)).astype(np.int64)
    palette = np.array(list(COLOURS.values()), np.float32)
    colour = np.clip(palette[named] + 0.25 * (uniform[:, 3:6] - 0.5), 0, 1)
    images = np.empty((len(indices), SIZE, SIZE, 3), np.uint8)
    for number, (name, _) in enumerate(_WEB):
        chosen = styles == number
        if chosen.any():
            images[chosen] = _render(classes[chosen], STYLES[name], uniform[chosen], noise[chosen], colour[chosen])
    words = list(COLOURS)
    captions = []
    for c, s, k, u in zip(classes, styles, named, uniform[:, 6], strict=True):
        style = STYLES[_WEB[s][0]]
        thing = NAMES[c] if u < 0.4 or style.drawing else f"{words[k]} {NAMES[c]}"
        captions.append(f"a {style.phrase} of a {thing}." if u < 0.85 else thing)
    return images, classes, captions
