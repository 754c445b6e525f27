"""The params file with everything switched on: all methods, averages along the run, periodic merging."""

import re
from pathlib import Path

from flows.compose import text_of

ROOT = Path(__file__).parent.parent.parent


def full_params() -> str:
    """The text of params.yaml for the preset `methods`, towers scored in float32 in one batch size."""
    text = text_of("methods", ROOT / "conf")
    weak = """
  weak: {source: shapes, seed: 1, draws: 128, batch_size: 128, lr: 1.0e-3, weight_decay: 0.1, beta2: 0.98,
    warmup_steps: 1, clip_norm: 1.0, precision: float32, log_every: 20}
"""
    assert "anchors: {}" in text
    text = re.sub("anchors: {}.*\n", f"anchors:{weak}", text)
    constant = "  constant-0: "
    assert constant in text
    from_weak = "  weak-0: {pool: weak, seed: 0, anchor: models/anchors/weak/anchor.safetensors, recipe: {}}\n"
    text = text.replace(constant, from_weak + constant)
    for auto, fixed in (("batch_size: auto", "batch_size: 500"), ("precision: auto", "precision: float32")):
        assert auto in text
        text = text.replace(auto, fixed)
    return text
