"""Another anchor than the seeds': its pre-training, and its head, in one stage."""

from pathlib import Path

from modelstock.devices import deterministic
from modelstock.params import load_params
from stages import run
from stages.anchor import anchor_from
from stages.pretrain import make_clip


def main(name: str, train: Path, held_out: Path, out: Path) -> None:
    """NAME: one of `anchors`. TRAIN, HELD_OUT: shards. OUT: the folder to write."""
    params = load_params()
    deterministic(params.threads)
    clip = make_clip(params.anchors[name], out, threads=params.threads)
    anchor = anchor_from(clip, params, train, held_out)
    anchor.save(out / "anchor.safetensors")
    print(f"anchor {name}: identity {anchor.identity[:12]}")


if __name__ == "__main__":
    run(main)
