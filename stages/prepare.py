"""A split of the embedded benchmark as webdataset shards with a manifest."""

from pathlib import Path

from modelstock.params import load_params
from modelstock.preparation import prepare
from stages import deterministic, run


def main(split: str, out: Path) -> None:
    """SPLIT: one of prepare.images. OUT: the folder to write."""
    params = load_params()
    deterministic(params.threads)
    manifest = prepare(split, params.prepare, out)
    print(f"{split}: {manifest.count} images, {len(manifest.labels)} labels, sha256 {manifest.sha256[:12]}")


if __name__ == "__main__":
    run(main)
