"""The params file with everything switched on: all methods, averages along the run, periodic merging."""

from pathlib import Path

from flows.compose import text_of

ROOT = Path(__file__).parent.parent.parent


def full_params() -> str:
    """The text of params.yaml for the preset `methods`, towers scored in float32 in one batch size."""
    text = text_of("methods", ROOT / "conf")
    for auto, fixed in (("batch_size: auto", "batch_size: 500"), ("precision: auto", "precision: float32")):
        assert auto in text
        text = text.replace(auto, fixed)
    return text
