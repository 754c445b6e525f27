"""Small splits of the embedded benchmark, as shards."""

from pathlib import Path

from modelstock.data.shapes.names import NAMES
from modelstock.data.shapes.render import SPLITS, draw
from modelstock.data.shards import write_shards
from modelstock.params import SHAPES_ROLES


def make_split(folder: Path, split: str, count: int, shard_size: int = 50):
    """`count` images of a split as shards."""
    images, labels = draw(split, range(count), seed=3)
    plan = SPLITS[split]
    return write_shards(
        folder,
        zip(images, labels, strict=True),
        benchmark=split,
        role=SHAPES_ROLES[split],
        labels=list(plan.labels),
        label_groups=[[NAMES.index(c) for c in group] for group in plan.labels.values()],
        classes=NAMES,
        shard_size=shard_size,
    )
