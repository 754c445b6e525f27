"""Shards of texts."""

from collections.abc import Sequence
from pathlib import Path

from modelstock.data.dataset import Dataset, open_dataset
from modelstock.data.manifest import make_manifest, save_manifest
from modelstock.data.shards import write_shard


def make_texts(
    folder: Path,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    names: Sequence[str] = ("bad", "good"),
    benchmark: str = "reviews",
    role: str = "in-distribution",
) -> Dataset:
    """Texts with labels as one shard, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = [
        (row, int(label), "txt", text.encode()) for row, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    shard = write_shard(folder / "000000.tar", examples)
    assert shard is not None
    manifest = make_manifest(
        benchmark=benchmark,
        role=role,
        labels=names,
        label_groups=[[place] for place in range(len(names))],
        classes=names,
        shards=[shard],
        modality="text",
    )
    save_manifest(folder, manifest)
    return open_dataset(folder)
