"""Training that resumes bit for bit.

The randomness of step s is drawn from (seed, s) alone: data order, crops and dropout. A resume point therefore is
the model, the optimizer and the step, and a run killed at any moment ends with the bytes of an uninterrupted one.
"""

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

from modelstock import shapes
from modelstock.errors import TrainingError
from modelstock.files import atomic_path
from modelstock.models import (
    TINY_CLIP,
    TINY_PREPROCESS,
    Classifier,
    build_clip,
    normalise,
    tokenizer,
)
from modelstock.params import FinetuneParams, Optimization, PretrainParams

Row = dict[str, Any]
SAVE_EVERY_S = 20.0  # a resume point of the tiny tower takes 0.03 s


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def seed_step(seed: int, name: str, step: int) -> int:
    """Seed torch's generators for one step, so that nothing depends on the steps before it."""
    mixed = np.random.SeedSequence([seed, zlib.crc32(name.encode()), step]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(mixed))
    return int(mixed)


@dataclass
class Run:
    """A training run that can stop and go on: what changes is the model, the optimizer, `step` and `history`.

    `folder` is its scratch place, one per fingerprint of everything the run depends on; the history there
    (`history.jsonl`) grows while it trains, so that others can follow.
    """

    name: str
    model: nn.Module
    optimization: Optimization
    seed: int
    steps: int
    folder: Path
    step: int = 0
    history: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        options = self.optimization
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=options.lr,
            weight_decay=options.weight_decay,
            betas=(0.9, options.beta2),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._point = self.folder / "state.pt"
        if self._point.exists():
            state = torch.load(self._point, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.history = state["step"], json.loads(state["history"])
        self._write_history()

    def _write_history(self) -> None:
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in self.history)
        with atomic_path(self.folder / "history.jsonl") as temporary:
            temporary.write_text(text)

    def log(self, row: Mapping[str, float]) -> None:
        """Add what is known at the present step to the history."""
        if self.history and self.history[-1]["step"] == self.step:
            self.history[-1].update(row)
        else:
            self.history.append({"step": self.step, **row})

    def save(self) -> None:
        """Write the resume point, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": json.dumps(self.history),
        }
        with atomic_path(self._point) as temporary:
            torch.save(state, temporary)
        self._write_history()

    def train(
        self, loss_of: Callable[[int], Tensor], *, every: int, at_epoch: Callable[[], Mapping[str, float]]
    ) -> None:
        """Step until `steps`; `loss_of(step)` is one batch's loss, `at_epoch` runs each `every` steps.

        Raises:
            TrainingError: a loss or gradient that is not finite, with step, learning rate and the last resume point.
        """
        options, saved_at, saved_step = self.optimization, time.monotonic(), self.step
        losses: list[float] = []
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=2, unit="step") as bar:
            while self.step < self.steps:
                rate = learning_rate(self.step, peak=options.lr, warmup=options.warmup_steps, steps=self.steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                seed_step(self.seed, self.name, self.step)
                self.model.train()
                loss = loss_of(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
                if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
                    raise TrainingError(
                        f"{self.name}, step {self.step}",
                        got=f"loss {loss.item()}, gradient norm {norm.item()} at learning rate {rate:.3g}",
                        expected="finite numbers",
                        cure=f"lower lr or clip_norm; the last resume point is step {saved_step}",
                    )
                self.optimizer.step()
                self.step += 1
                losses.append(loss.item())
                bar.update()
                if self.step % options.log_every == 0 or self.step % every == 0:
                    # The last batch's loss: a mean since the last row would depend on where a run resumed.
                    self.log({"loss": losses[-1], "lr": rate, "grad_norm": norm.item()})
                if self.step % every == 0:
                    self.model.eval()
                    self.log(at_epoch())
                    bar.set_postfix({k: f"{v:.3f}" for k, v in self.history[-1].items() if "/" in k})
                if self.step == self.steps or time.monotonic() - saved_at > SAVE_EVERY_S:
                    self.save()
                    saved_at, saved_step = time.monotonic(), self.step


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> float:
    """Share of `images` (N, 3, S, S) whose largest logit is their label."""
    hits = sum(
        int((model(images[i : i + batch_size]).argmax(dim=1) == labels[i : i + batch_size]).sum())
        for i in range(0, len(images), batch_size)
    )
    return hits / len(images)


def epoch_order(count: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits `count` examples."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_rows(step: int, *, count: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """The examples of one step: whole batches of the epoch's order, the rest of an epoch left out as usual."""
    per_epoch = count // batch_size
    epoch, position = divmod(step, per_epoch)
    return epoch_order(count, seed=seed, epoch=epoch)[position * batch_size : (position + 1) * batch_size]


def random_resized_crops(images: Tensor, scale: tuple[float, float]) -> Tensor:
    """One RandomResizedCrop an image, to the images' own size (bicubic), drawn from torch's generator."""
    size = list(images.shape[-2:])
    crops = []
    for image in images:
        box = transforms.RandomResizedCrop(size, scale=scale).make_params([image])
        crops.append(
            transforms.functional.resized_crop(
                image,
                box["top"],
                box["left"],
                box["height"],
                box["width"],
                size,
                InterpolationMode.BICUBIC,
                True,
            )
        )
    return torch.stack(crops)


def autocast(precision: str, device: str = "cpu") -> torch.autocast:
    """Autocast to bfloat16, or a context that does nothing for float32."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def finetune(
    model: Classifier,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    params: FinetuneParams,
    *,
    seed: int,
    folder: Path,
) -> list[Row]:
    """Fine-tune tower and head in place; returns the history.

    `train`, `held_out`: normalised images (N, 3, S, S) float32 and labels (N,) int64. `held_out` is scored each
    epoch and never trained on.

    Raises:
        TrainingError: fewer examples than a batch, or a loss that is not finite.
    """
    images, labels = train
    if len(images) < params.batch_size:
        raise TrainingError(
            "finetune.batch_size",
            got=params.batch_size,
            expected=f"at most the {len(images)} training images",
            cure="lower it",
        )
    per_epoch = len(images) // params.batch_size
    run = Run(f"seed-{seed}", model, params, seed, per_epoch * params.epochs, folder)

    def loss_of(step: int) -> Tensor:
        rows = torch.from_numpy(batch_rows(step, count=len(images), batch_size=params.batch_size, seed=seed))
        crops = random_resized_crops(images[rows], params.crop_scale)
        with autocast(params.precision):
            logits = model(crops)
        return functional.cross_entropy(logits.float(), labels[rows], label_smoothing=params.label_smoothing)

    run.train(loss_of, every=per_epoch, at_epoch=lambda: {"validation/top1": top1(model, *held_out)})
    model.eval()
    return run.history


def shared_positives_loss(image: Tensor, text: Tensor, classes: Tensor, scale: Tensor) -> Tensor:
    """Image-text contrast in which every caption of the same class is a positive, in both directions.

    `image`, `text`: (B, D) normalised; `classes`: (B,). Source: UniCL, Yang et al., arXiv 2204.03610.
    """
    logits = scale * image @ text.T
    same = (classes[:, None] == classes[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def pretrain(params: PretrainParams, *, folder: Path) -> tuple[nn.Module, list[Row]]:
    """Train the tiny CLIP on captioned draws of all styles; returns it and the history."""
    torch.manual_seed(params.seed)
    clip = build_clip(TINY_CLIP)
    tokenize = tokenizer(TINY_CLIP)
    steps = params.draws // params.batch_size
    run = Run("pretrain", clip, params, params.seed, steps, folder)

    def loss_of(step: int) -> Tensor:
        indices = range(step * params.batch_size, (step + 1) * params.batch_size)
        images, classes, captions = shapes.web(indices, seed=params.seed)
        # Captions repeat within a batch: each text is encoded once.
        texts = sorted(set(captions))
        with autocast(params.precision):
            image = clip.encode_image(normalise(images, TINY_PREPROCESS), normalize=True)  # type: ignore[operator]
            text = clip.encode_text(tokenize(texts), normalize=True)  # type: ignore[operator]
        place = {text: row for row, text in enumerate(texts)}
        rows = torch.tensor([place[caption] for caption in captions])
        scale = clip.logit_scale.exp().clamp(max=100)  # type: ignore[operator]
        return shared_positives_loss(image.float(), text.float()[rows], torch.from_numpy(classes), scale)

    run.train(loss_of, every=max(1, steps // 10), at_epoch=dict)
    return clip.eval(), run.history


def batches(count: int, size: int) -> Iterator[Sequence[int]]:
    """Consecutive ranges of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
