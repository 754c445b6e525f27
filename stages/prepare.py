"""A split as webdataset shards with a manifest, from the embedded benchmark or from what is on disk."""

from pathlib import Path

from modelstock.data.preparation import prepare
from modelstock.params import load_params
from stages import run


def main(split: str, out: Path) -> None:
    """SPLIT: one of prepare.splits. OUT: the folder to write."""
    params = load_params()
    manifest = prepare(split, params.prepare, params.classes, out, threads=params.threads)
    missing = [f"{len(manifest.unreadable)} unreadable"] if manifest.unreadable else []
    missing += [f"left out: {count} {what}" for what, count in sorted(manifest.left_out.items())]
    print(
        f"{split}: {manifest.count} {manifest.modality}s, {len(manifest.labels)} labels, "
        + "".join(f"{text}, " for text in missing)
        + f"sha256 {manifest.sha256[:12]}"
    )


if __name__ == "__main__":
    run(main)
