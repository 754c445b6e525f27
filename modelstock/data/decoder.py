"""The one place that decodes images: preparation, training, validation, evaluation and statistics see the same pixels.

They are those of torchvision's ImageFolder, which open_clip evaluates on: the first frame in the mode it is stored in,
converted to RGB before anything else; the orientation that a camera notes in EXIF is not applied. Modes of more than 8
bits a channel are refused, because conversion would make nearly everything white and no one scale is right.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

# Pillow reads more, and runs other programs for some of it.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
# What names of images end in.
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".jp2",
)
_ORIENTATION = 0x0112  # in EXIF; 1: as stored


class Unreadable(ValueError):
    """Why an image is not used, in one line."""


class Facts(NamedTuple):
    """What an image's file says of it: Pillow's name of its format, whether EXIF turns it, whether it has frames."""

    format: str
    turned: bool
    frames: bool


@contextmanager
def opened(content: bytes) -> Iterator[Image.Image]:
    """An image of any mode, its pixels not decoded yet.

    Raises:
        Unreadable: here or in the block, whatever Pillow raises for a file that is damaged, of another format, or
            above its limit of pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of transparent palettes, damaged EXIF and the like, an image at a time
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                yield image
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError as error:  # whose own text has a number of this process
        raise Unreadable(f"UnidentifiedImageError: nothing that begins like {', '.join(FORMATS)}") from error
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise Unreadable(" ".join(f"{type(error).__name__}: {error}".split())) from error


def decode(content: bytes, border: int = 0) -> Image.Image:
    """A file's picture in RGB, with `border` pixels removed from each side.

    Raises:
        Unreadable: a damaged file, more than 8 bits a channel, or nothing left within the border.
    """
    with opened(content) as image:
        width, height = image.size
        if min(width, height) <= 2 * border:
            raise Unreadable(f"{width}x{height} pixels are all border")
        image.load()  # which may change the mode
        if image.mode.startswith(("I", "F")):
            raise Unreadable(f"more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
        picture = image.convert("RGB")
    return picture.crop((border, border, width - border, height - border)) if border else picture


def facts_of(content: bytes) -> Facts:
    """What a file that decodes says of its image.

    Raises:
        Unreadable: a file that does not even begin like an image.
    """
    with opened(content) as image:
        turned = False
        with suppress(Exception):  # damaged EXIF is none
            turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        # Photographs in MPO hold previews of themselves.
        frames = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        return Facts(image.format or "", turned, frames)
