"""Refuses bad settings before any other stage starts: DVC deletes the outputs of a stage before it starts it."""

from pathlib import Path

from modelstock.files import atomic_path
from modelstock.params import load_params
from stages import run


def main(params: Path, out: Path) -> None:
    """PARAMS: the params file; OUT: a file that is always the same, so that good values run no stage again."""
    load_params(params)
    with atomic_path(out) as temporary:
        temporary.write_text("valid\n")


if __name__ == "__main__":
    run(main)
