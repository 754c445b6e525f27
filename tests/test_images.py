"""Images come to a tower as open_clip's own evaluation transform makes them, pixel for pixel."""

import io

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from modelstock.data.dataset import open_dataset
from modelstock.data.examples import InShards
from modelstock.data.images import Framing, normalise
from modelstock.data.shards import write_shards

OPENAI = {
    "size": 64,
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
}


def photograph(width: int, height: int, mode: str) -> Image.Image:
    """A JPEG as a camera might write it: smooth areas and noise, in the mode it would be decoded to."""
    random = np.random.default_rng(width)
    coarse = Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8))
    smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.clip(np.asarray(smooth).astype(int) + random.integers(-20, 20, (height, width, 3)), 0, 255)
    file = io.BytesIO()
    Image.fromarray(noisy.astype(np.uint8)).convert(mode).save(file, "jpeg", quality=90)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("resize_mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(100, 75, "RGB"), (75, 101, "L"), (64, 64, "L"), (50, 64, "RGB"), (90, 90, "CMYK")])
def test_framing_then_normalising_is_open_clips_transform(shape, interpolation, resize_mode):
    image = photograph(*shape)
    preprocess = {**OPENAI, "interpolation": interpolation, "resize_mode": resize_mode}
    transform = open_clip.image_transform(
        64, is_train=False, mean=OPENAI["mean"], std=OPENAI["std"], interpolation=interpolation, resize_mode=resize_mode
    )
    framed = Framing.of(preprocess)(image)
    assert framed.shape == (64, 64, 3)
    torch.testing.assert_close(normalise(framed[None], preprocess)[0], transform(image), rtol=1e-6, atol=1e-6)


def test_the_middle_of_an_image_by_hand():
    image = np.zeros((8, 16, 3), np.uint8)
    image[:, 4:12] = 200
    assert np.array_equal(Framing(8, "bicubic", "shortest")(Image.fromarray(image)), np.full((8, 8, 3), 200, np.uint8))


def test_a_border_is_cut_before_anything_else(tmp_path):
    image = np.zeros((12, 14, 3), np.uint8)
    image[2:-2, 2:-2] = 255  # what is left is white
    manifest = write_shards(
        tmp_path,
        [(image, 0)],
        benchmark="objectnet",
        role="shift",
        labels=["a", "b"],
        label_groups=[[0], [1]],
        classes=["a", "b"],
        shard_size=1,
    )
    stored = InShards(tmp_path, manifest.model_copy(update={"border": 2}))
    assert stored.size(0) == (8, 10)
    assert (stored.image(0) == 255).all()
    assert (Framing(8, "bicubic", "shortest")(stored.cut(0)) == 255).all()
    assert open_dataset(tmp_path).images.size(0) == (12, 14)
