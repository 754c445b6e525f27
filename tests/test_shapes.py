"""The embedded benchmark: every image depends on (seed, split, index) alone, and the splits play their roles."""

import numpy as np
import pytest
import torch

from modelstock.data.shapes.names import NAMES
from modelstock.data.shapes.render import CLASSES, SIZE, SPLITS, draw, web
from modelstock.models.heads import tokenizer
from modelstock.models.towers import TINY_CLIP
from modelstock.params import SHAPES_ROLES
from modelstock.training.pretrain import web_batches


@pytest.mark.parametrize("split", SPLITS)
def test_an_image_is_the_same_in_any_batch_and_order(split):
    together, labels = draw(split, range(40), seed=5)
    apart, own = draw(split, [31, 7], seed=5)
    np.testing.assert_array_equal(apart, together[[31, 7]])
    np.testing.assert_array_equal(own, labels[[31, 7]])
    assert together.shape == (40, SIZE, SIZE, 3)
    assert together.dtype == np.uint8


def test_seed_and_split_change_the_image():
    images = [draw("train", [0], seed=1)[0], draw("train", [0], seed=2)[0], draw("held-out", [0], seed=1)[0]]
    assert len({image.tobytes() for image in images}) == 3


def test_no_two_test_images_are_equal_and_none_is_a_training_image():
    splits = ("train", "held-out", "shapes")
    seen = {image.tobytes() for split in splits for image in draw(split, range(200), seed=7)[0]}
    assert len(seen) == 600


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced_and_stand_for_known_classes(split):
    _, labels = draw(split, range(240), seed=1)
    counts = np.bincount(labels, minlength=len(SPLITS[split].labels))
    assert counts.max() - counts.min() <= 1
    classes = [c for group in SPLITS[split].labels.values() for c in group]
    assert set(classes) <= set(NAMES)
    assert len(classes) == len(set(classes))


def test_the_shifts_have_the_real_sets_label_structure():
    assert [len(SPLITS[s].labels) for s in ("shapes", "shapes-v2", "shapes-sketch")] == [24, 24, 24]
    subsets = [set(SPLITS[s].labels) for s in ("shapes-rendition", "shapes-adversarial")]
    assert [len(s) for s in subsets] == [12, 12]
    assert subsets[0] != subsets[1]
    assert max(len(group) for group in SPLITS["shapes-objectnet"].labels.values()) > 1
    assert list(SHAPES_ROLES) == list(SPLITS)
    assert all(role == "shift" for name, role in SHAPES_ROLES.items() if name.startswith("shapes-"))
    assert tuple(CLASSES) == NAMES


def test_every_class_has_an_object_of_its_own_within_the_frame():
    y, x = np.mgrid[1:-1:65j, -1:1:65j]
    masks = {name: field(x, y) < 0 for name, field in CLASSES.items()}
    for name, mask in masks.items():
        assert 0.1 < mask.mean() < 0.9, name
    names = list(masks)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            union = (masks[a] | masks[b]).sum()
            assert (masks[a] & masks[b]).sum() / union < 0.95, (a, b)


def test_sketches_are_grey_and_photos_are_not():
    sketch, _ = draw("shapes-sketch", range(50), seed=1)
    photo, _ = draw("shapes", range(50), seed=1)
    assert np.abs(sketch.astype(int) - sketch[..., :1]).max() == 0
    assert np.abs(photo.astype(int) - photo[..., :1]).mean() > 10


def test_captions_name_the_class_that_is_drawn_and_repeat():
    _, classes, captions = web(range(300), seed=1)
    assert all(NAMES[c] in caption for c, caption in zip(classes, captions, strict=True))
    assert {"photo", "cartoon", "sketch"} <= {w for caption in captions for w in caption.split()}
    assert web([299], seed=1)[2] == captions[299:]


def test_a_batch_of_pretraining_is_the_same_wherever_training_begins_and_holds_each_captions_tokens():
    first, *others = web_batches(0, 3, batch_size=40, seed=5)
    again = list(web_batches(1, 3, batch_size=40, seed=5))
    for batch, other in zip(others, again, strict=True):
        assert all(torch.equal(part, same) for part, same in zip(batch, other, strict=True))
    _, _, captions = web(range(40), seed=5)
    _, _, rows, texts = first
    assert torch.equal(texts[rows], tokenizer(TINY_CLIP)(captions))
    assert len(texts) == len(set(captions))
