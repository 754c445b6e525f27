"""The one place that decodes texts: preparation, training, validation, evaluation and statistics see the same ones.

A text is UTF-8 without a byte order mark and without outer white space.
"""

import unicodedata

from modelstock.data.decoder import Unreadable

LONGEST = 1 << 20  # bytes of one text; the encoders read a few thousand


def text_of(content: bytes) -> str:
    """A file's text.

    Raises:
        Unreadable: bytes that are not UTF-8, a NUL character, nothing but white space, or more than 1 MiB.
    """
    if len(content) > LONGEST:
        raise Unreadable(f"{len(content)} bytes: at most {LONGEST}")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(f"byte {error.start} is not UTF-8") from error
    if "\0" in text:
        raise Unreadable("a NUL character")
    if not text:
        raise Unreadable("empty")
    return text


class _Plain(dict[int, int]):
    """Code point -> itself for letters, digits and the marks on them, else a space; for str.translate."""

    def __missing__(self, code: int) -> int:
        kept = chr(code).isalnum() or unicodedata.category(chr(code)).startswith("M")
        self[code] = code if kept else ord(" ")
        return self[code]


_PLAIN = _Plain()


def words(text: str) -> tuple[str, ...]:
    """A text's lower-case runs of letters and digits, which tell whether two texts are the same.

    A text without any, such as `:-)`, is its own only word.
    """
    found = unicodedata.normalize("NFC", text.lower()).translate(_PLAIN).split()
    return tuple(found) if found else (text.strip(),)
