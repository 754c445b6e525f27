"""Loading: every example once an epoch however it is shared out, and the same batches from every number of workers."""

import io
import tarfile
import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms

from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.examples import InMemory, InShards
from modelstock.data.images import normalise
from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS
from modelstock.data.shards import write_shards
from modelstock.errors import DataError
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.training.ahead import made_ahead
from modelstock.training.batches import (
    Augmentation,
    TrainingBatches,
    batch_rows,
    crop_box,
    mixed_pairs,
    resized_crops,
)
from modelstock.training.distributed import World
from modelstock.training.loop import Callback
from modelstock.training.recipe import new_run
from modelstock.training.validation import validation_batches
from tests.support.splits import make_split
from tests.support.training import RECIPE, dropping, equal

EVERYTHING = {"mixup": 0.4, "rand_augment_operations": 2, "flip": True, "crop_scale": (0.3, 1.0)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    make_split(folder, "train", 40, shard_size=15)
    return folder


def batches(examples, *, rank=0, size=1, seed=0, order_seed=None, **changes):
    return TrainingBatches(
        examples,
        Augmentation(**{"crop_scale": (0.9, 1.0), **changes}),
        TINY_PREPROCESS,
        batch_size=8,
        seed=seed,
        order_seed=order_seed,
        name="seed-0",
        world=World(rank, size),
    )


def same(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_epoch_visits_every_example_once_and_epochs_and_seeds_differ():
    def epoch(number, seed):
        return np.concatenate([batch_rows(number * 5 + i, count=20, batch_size=4, seed=seed) for i in range(5)])

    assert sorted(epoch(0, 1)) == list(range(20))
    assert not np.array_equal(epoch(0, 1), epoch(1, 1))
    assert not np.array_equal(epoch(0, 1), epoch(0, 2))


def test_an_order_seed_changes_the_order_alone_and_a_seed_then_the_crops_alone(shards):
    examples = open_dataset(shards).examples(in_memory=True)

    def labels_and_pixels(**seeds):
        made = batches(examples, crop_scale=(0.5, 1.0), **seeds)
        ((images, labels),) = made.load(0, 1, workers=0, pin=False)
        return labels.tolist(), images

    own, pixels = labels_and_pixels(seed=0)
    assert same(labels_and_pixels(seed=0, order_seed=0)[1], pixels)
    reordered, _ = labels_and_pixels(seed=0, order_seed=5)
    assert reordered == labels_and_pixels(seed=3, order_seed=5)[0] == labels_and_pixels(seed=5)[0] != own
    assert not same(labels_and_pixels(seed=0, order_seed=5)[1], labels_and_pixels(seed=3, order_seed=5)[1])


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("size", [(32, 32), (20, 90), (90, 20), (375, 500)])
def test_crops_are_drawn_as_torchvision_draws_them(size, scale):
    transform = transforms.RandomResizedCrop(8, scale=scale)
    generator = torch.Generator().manual_seed(0)
    found = [crop_box(*size, scale, generator) for _ in range(100)]
    torch.manual_seed(0)
    known = [transform.make_params([torch.empty(3, *size)]) for _ in range(100)]
    assert found == [(k["top"], k["left"], k["height"], k["width"]) for k in known]


def test_a_batch_of_crops_is_each_crop_by_torchvision():
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (32, 40, 3), np.uint8) for _ in range(5)]
    boxes = [(0, 0, 32, 32), (1, 2, 20, 30), (2, 1, 20, 30), (0, 8, 32, 32), (5, 5, 9, 8)]
    found = resized_crops(images, boxes, TINY_PREPROCESS)
    for crop, image, box in zip(found, images, boxes, strict=True):
        normal = normalise(image[None], TINY_PREPROCESS)[0]
        known = transforms.functional.resized_crop(normal, *box, [32, 32], InterpolationMode.BICUBIC, True)
        assert torch.equal(crop, known)


def test_mixup_of_neighbours_by_hand():
    images, labels = torch.tensor([0.0, 1.0, 2.0, 4.0]).reshape(4, 1, 1, 1), torch.tensor([5, 6, 7, 8])
    mixed, own, others, weights = mixed_pairs(images, labels, 0.75)
    assert mixed.flatten().tolist() == [0.25, 0.75, 2.5, 3.5]
    assert own.tolist() == [5, 6, 7, 8]
    assert others.tolist() == [6, 5, 8, 7]
    assert weights.tolist() == [0.75] * 4


@pytest.mark.parametrize("workers", [1, 2])
def test_the_batches_are_the_same_at_every_number_of_loader_workers(shards, workers):
    images, labels = read_all(open_dataset(shards))
    data = batches(InMemory(images, labels), **EVERYTHING)
    ahead = list(data.load(3, 12, workers=workers, pin=False))
    assert len(ahead) == 9
    assert all(same(found, data[step]) for found, step in zip(ahead, range(3, 12), strict=True))


class Watched(InMemory):
    """Noise images that note which thread reads them; one may not decode."""

    def __init__(self, unreadable=None):
        super().__init__(np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8), np.arange(40) % 24)
        self.threads, self._unreadable = set(), unreadable

    def image(self, row):
        self.threads.add(threading.current_thread())
        if row == self._unreadable:
            raise DataError("shard", got="noise", expected="an image that decodes", cure="prepare again")
        return super().image(row)


AUGMENTATIONS = {
    "crops": {"crop_scale": (0.3, 1.0)},
    "flips": {"flip": True},
    "mixup": {"mixup": 0.4},
    "RandAugment": {"rand_augment_operations": 2},
    "everything": EVERYTHING,
}


NO_GPU = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")


@NO_GPU
@pytest.mark.parametrize("changes", AUGMENTATIONS.values(), ids=AUGMENTATIONS)
def test_batches_that_a_thread_makes_are_those_made_one_by_one_whatever_is_drawn_meanwhile(changes):
    expected = [batches(Watched(), **changes)[step] for step in range(3, 13)]
    examples = Watched()
    made = batches(examples, **changes).load(3, 13, workers=0, pin=True)
    for batch in expected:
        assert same(next(made), batch)
        torch.manual_seed(1)
        dropped = [torch.rand(64) for _ in range(200)]  # as dropout does while the next batch is being made
        torch.manual_seed(1)
        assert same(dropped, [torch.rand(64) for _ in range(200)])
    assert next(made, None) is None
    by_thread = examples.threads - {threading.current_thread()}
    assert len(by_thread) == (0 if {"mixup", "rand_augment_operations"} & changes.keys() else 1)
    assert not any(thread.is_alive() for thread in by_thread)


@NO_GPU
def test_an_image_that_does_not_decode_is_an_error_of_its_own_step():
    rows = batch_rows(4, count=40, batch_size=8, seed=0)
    examples = Watched(unreadable=rows[3])
    made = batches(examples).load(0, 5, workers=0, pin=True)
    assert all(same(next(made), batches(Watched())[step]) for step in range(4))
    with pytest.raises(DataError, match="shard: got noise"):
        next(made)
    assert not any(thread.is_alive() for thread in examples.threads - {threading.current_thread()})


def test_two_items_are_made_before_they_are_asked_for_and_none_after_a_stop():
    asked, made, waits = [], [], threading.Semaphore(0)

    def items():
        for number in range(100):
            made.append(number)
            waits.release()
            yield number

    ahead = made_ahead(items())
    for number in range(3):
        asked.append(next(ahead))
        for _ in range(3 if number == 0 else 1):
            assert waits.acquire(timeout=60)
    ahead.close()
    assert asked == [0, 1, 2]
    assert made == [0, 1, 2, 3, 4]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def fine_tuning(anchor, *, pin, callbacks=()):
    """A fine-tuning with dropout, on batches that are made as for a GPU or not."""
    run = new_run(
        build_classifier(dropping(anchor)), Watched(), RECIPE, preprocess=TINY_PREPROCESS, seed=0, callbacks=callbacks
    )
    run.batches = partial(batches(Watched()).load, workers=0, pin=pin)
    return run


@NO_GPU
def test_the_thread_changes_no_byte_of_a_training_with_dropout(anchor):
    runs = [fine_tuning(anchor, pin=pin) for pin in (False, True)]
    for run in runs:
        run.train(until=8)
    expected, found = (tensors_of(run.model) for run in runs)
    assert equal(found, expected)
    assert runs[0].last == runs[1].last


@NO_GPU
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_training_that_is_stopped_leaves_no_thread(anchor, stop):
    class Stop(Callback):
        def after_step(self, run):
            running.extend(thread for thread in threading.enumerate() if thread.name.startswith("ahead"))
            raise stop

    running = []
    with pytest.raises(stop) as raised:
        fine_tuning(anchor, pin=True, callbacks=[Stop()]).train()
    assert len(running) == 1
    assert not running[0].is_alive(), raised  # although the error still holds the training's frames


def test_beside_training_on_cpus_there_is_no_thread():
    examples = Watched()
    assert len(list(batches(examples).load(0, 5, workers=0, pin=False))) == 5
    assert examples.threads == {threading.current_thread()}


def test_reading_from_the_shards_gives_the_batches_of_memory(shards):
    dataset = open_dataset(shards)
    (images, labels), stored = read_all(dataset), dataset.images
    assert np.array_equal(stored.labels, labels)
    assert all(np.array_equal(stored.image(row), images[row]) for row in range(40))
    for changes in ({}, EVERYTHING):
        first, second = (batches(e, **changes) for e in (InMemory(images, labels), stored))
        assert all(same(first[step], second[step]) for step in range(7))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_the_shares_of_all_devices_are_the_batch_of_one_so_that_none_is_lost_or_doubled(shards, size, changes):
    images, labels = read_all(open_dataset(shards))
    examples = InMemory(images, labels)
    whole = batches(examples, **changes)
    shares = [batches(examples, rank=rank, size=size, **changes) for rank in range(size)]
    for step in range(10):
        parts = [share[step] for share in shares]
        assert all(len(part[0]) == 8 // size for part in parts)
        assert same([torch.cat(column) for column in zip(*parts, strict=True)], whole[step])


def test_an_epoch_over_devices_and_workers_holds_every_example_once(shards):
    count = 40
    marked = InMemory(np.zeros((count, 32, 32, 3), np.uint8), np.arange(count))
    seen = [
        int(label)
        for rank in range(2)
        for _, labels in batches(marked, rank=rank, size=2).load(0, 5, workers=2, pin=False)
        for label in labels
    ]
    assert sorted(seen) == list(range(count))


def test_images_of_different_sizes_make_one_batch(tmp_path):
    random = np.random.default_rng(0)
    sizes = [(40, 50), (32, 32), (64, 33), (50, 40)] * 2
    pictures = [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    write_shards(
        tmp_path,
        zip(pictures, range(8), strict=True),
        benchmark="train",
        role="train",
        labels=list(NAMES),
        label_groups=[[i] for i in range(24)],
        classes=NAMES,
        shard_size=3,
    )
    stored = open_dataset(tmp_path).images
    assert [stored.size(row) for row in range(8)] == sizes
    images, labels = batches(stored, **{**EVERYTHING, "mixup": 0.0})[0]
    assert images.shape == (8, 3, 32, 32)
    assert sorted(labels.tolist()) == list(range(8))
    (scored, in_order), *rest = validation_batches(stored, TINY_PREPROCESS, batch_size=6)
    assert scored.shape == (6, 3, 32, 32)
    assert in_order.tolist() == list(range(6))
    assert [len(labels) for _, labels in rest] == [2]


def test_shards_that_do_not_hold_what_the_manifest_says_are_refused(shards):
    manifest = open_dataset(shards).manifest
    fewer = manifest.model_copy(update={"labels": manifest.labels[:3]})
    with pytest.raises(DataError, match=r"000000\.tar: got 15 examples, \d+ without image or valid label; expected 15"):
        InShards(shards, fewer)


def test_a_jpeg_with_a_long_preface_has_its_size_too(tmp_path):
    (tmp_path / "shards").mkdir()
    make_split(tmp_path / "shards", "train", 1)
    manifest = open_dataset(tmp_path / "shards").manifest
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "x" * 40_000  # a description longer than the head that is read
    Image.fromarray(np.full((30, 50, 3), 9, np.uint8)).save(buffer, "jpeg", exif=exif)
    with tarfile.open(tmp_path / "shards/000000.tar", "w") as tar:
        for name, content in (("a.cls", b"3"), ("a.jpg", buffer.getvalue())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    stored = InShards(tmp_path / "shards", manifest)
    assert stored.size(0) == (30, 50)
    assert stored.image(0).shape == (30, 50, 3)
    assert stored.labels.tolist() == [3]
