"""The training loop: one seed, step by step, that stops and goes on without changing a bit.

The randomness of step s is drawn from (seed, s) alone: data order, augmentation and dropout. A resume point therefore
is the model, the optimizer, the loss scaler, the step and the history, and a run killed at any moment ends with the
bytes of an uninterrupted one. Whatever happens beside the steps is a callback (callbacks.py, validation.py, resume.py).
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modelstock.errors import TrainingError
from modelstock.progress import progress_bar
from modelstock.training.distributed import ALONE, World

HistoryRow = dict[str, Any]
Batch = tuple[Tensor, ...]  # tensors of equal first dimension: the examples
MicroBatch = int | Literal["auto"] | None


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, constant: bool = False) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to 0 at `steps`, or `constant`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if constant:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def step_seed(seed: int, name: str, step: int) -> int:
    """What the generators of one step are seeded with, so that nothing depends on the steps before it."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode()), step]).generate_state(1, np.uint64)[0])


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, as torch.manual_seed does, in a hundredth of its time.

    For a GPU that is not in use yet, torch.manual_seed formats a stack trace at every call.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def autocast(precision: str, device: str = "cpu") -> torch.autocast:
    """Autocast to bfloat16 or float16, or a context that does nothing for float32."""
    lower = torch.float16 if precision == "float16" else torch.bfloat16
    return torch.autocast(device, dtype=lower, enabled=precision != "float32")


def adamw(
    groups: Sequence[Mapping[str, Any]], *, lr: float, weight_decay: float, beta2: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over `groups`, each with `params` and, where wanted, `scale` (of the learning rate) and `weight_decay`.

    Source: Loshchilov, Hutter, arXiv 1711.05101.
    """
    return torch.optim.AdamW(
        [{"scale": 1.0, **group} for group in groups],
        lr=lr,
        weight_decay=weight_decay,
        betas=(0.9, beta2),
        fused=device.type == "cuda",  # on two CPU cores it saved 1 % of a step
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, one of its libraries, or the CPU's allocator, refused memory."""
    refusals = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in refusals)


class DamagedPoint(Exception):
    """A resume point from which nothing is taken; the run does without it, and no user sees this."""


class Callback:
    """What happens beside the steps. Its state is part of the resume point, so that it resumes as exactly as they."""

    def before_step(self, run: "Run") -> None:
        """Before step `run.step`."""

    def after_step(self, run: "Run") -> None:
        """After a step; `run.step` counts it already."""

    def state(self) -> dict[str, Any]:
        """What must survive a stop: tensors, numbers, strings and containers of them."""
        return {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise DamagedPoint where what `state` speaks of is not there as it was."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""


@dataclass(kw_only=True)
class Run:
    """A training run: what changes is the model, the optimizer, the scaler, `step`, `history` and the callbacks.

    `objective`: (the model as it is called, one batch) -> mean loss over its examples. `schedule`: step -> learning
    rate. `batches`: (first step, last step + 1) -> the batches of these steps, this process's share of each.
    `clip_norm`: the greatest norm of a step's gradient. `precision`: that of the objective; float16 scales the loss.
    `micro_batch`: examples at a time, gradients summed; None: the whole share; "auto": halved until it fits.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Callable[[nn.Module, Batch], Tensor]
    schedule: Callable[[int], float]
    batches: Callable[[int, int], Generator[Batch, None, None]]
    seed: int
    steps: int
    clip_norm: float
    precision: str = "float32"
    micro_batch: MicroBatch = None
    compile: bool = False
    callbacks: Sequence["Callback"] = ()
    world: World = ALONE
    step: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    saved_step: int = 0  # of the last resume point
    last: dict[str, float] = field(default_factory=dict)  # loss, lr, grad_norm of the last step

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.precision == "float16")
        self._fitting: int | None = None  # the micro-batch that "auto" came down to
        self.rewrap()

    def rewrap(self) -> None:
        """Wrap the model for its calls anew: to be done when other parameters than before are to be trained."""
        self.called: nn.Module = self.model
        if self.compile:
            self.called = torch.compile(self.called)  # type: ignore[assignment]
        if self.world.size > 1:
            ids = None if self.world.device.type == "cpu" else [self.world.device.index]
            self.called = DistributedDataParallel(self.called, device_ids=ids)

    def state(self) -> dict[str, Any]:
        """The resume point."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "history": self.history,
            "last": self.last,
            "micro_batch": self._fitting,
            "callbacks": [callback.state() for callback in self.callbacks],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise DamagedPoint where something beside a resume point that it needs is not there as it was."""
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.check_state(saved)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a resume point."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self._fitting = state["step"], list(state["history"]), state["micro_batch"]
        self.last, self.saved_step = dict(state["last"]), self.step
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state(saved)

    def log(self, row: Mapping[str, float]) -> None:
        """Add what is known at the present step to the history."""
        if self.history and self.history[-1]["step"] == self.step:
            self.history[-1].update(row)
        else:
            self.history.append({"step": self.step, **row})

    def train(self, until: int | None = None) -> None:
        """Step until `until`, or to the end; see `stepping`."""
        for _ in self.stepping(until):
            pass

    def stepping(self, until: int | None = None) -> Iterator[int]:
        """Step until `until`, or to the end; gives the count of steps after each, its callbacks done.

        Raises:
            TrainingError: a loss or gradient that is not finite, with step, learning rate and the last resume point;
                or memory that does not suffice, with what to change.
        """
        stop = self.steps if until is None else until
        with (
            contextlib.closing(self.batches(self.step, stop)) as batches,  # however it ends, none is made any more
            progress_bar(
                total=self.steps,
                initial=self.step,
                desc=self.name,
                mininterval=2,
                unit="step",
                disable=self.world.rank > 0,
                leave=stop == self.steps,
            ) as bar,
        ):
            while self.step < stop:
                for callback in self.callbacks:
                    callback.before_step(self)
                self._step(next(batches))
                for callback in self.callbacks:
                    callback.after_step(self)
                bar.update()
                yield self.step

    def _step(self, batch: Batch) -> None:
        rate = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.model.train()
        loss = self._gradients(batch)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        # A scaler that is still finding its scale skips the step of an overflowing gradient by itself.
        skipped = self.scaler.is_enabled() and self.scaler.get_scale() > 1 and not bool(torch.isfinite(norm))
        if not bool(torch.isfinite(loss)) or not (skipped or bool(torch.isfinite(norm))):
            raise TrainingError(
                f"{self.name}, step {self.step}",
                got=f"loss {loss.item()}, gradient norm {norm.item()} at learning rate {rate:.3g}",
                expected="finite numbers",
                cure=f"lower lr or clip_norm; the last resume point is step {self.saved_step}",
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.last = {"loss": loss.item(), "lr": rate}
        self.last |= {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        self.last |= {} if skipped else {"grad_norm": norm.item()}

    def _gradients(self, batch: Batch) -> Tensor:
        """Gradients of the batch's mean loss, and that loss; smaller micro-batches where memory says so."""
        # A forward pass that fails on its way has changed BatchNorm's statistics already.
        before = [buffer.clone() for buffer in self.model.buffers()] if self.micro_batch == "auto" else []
        while True:
            seed_torch(step_seed(self.seed, f"{self.name}/forward/{self.world.rank}", self.step))
            size = self._fitting or (self.micro_batch if isinstance(self.micro_batch, int) else len(batch[0]))
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._accumulate(batch, min(size, len(batch[0])))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch != "auto" or size == 1:
                    raise TrainingError(
                        f"{self.name}, step {self.step}",
                        got=f"not enough memory for {size} examples at a time",
                        expected="a micro-batch that fits",
                        cure=f"set micro_batch to {max(1, size // 2)} or auto (the batch stays the same), "
                        "gradient_checkpointing to true, or precision to bfloat16",
                    ) from error
            # Outside of the handler, which keeps the failed step's tensors alive.
            for buffer, kept in zip(self.model.buffers(), before, strict=True):
                buffer.copy_(kept)
            self._fitting = size // 2
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()

    def _accumulate(self, batch: Batch, size: int) -> Tensor:
        count = len(batch[0])
        total = torch.zeros((), device=self.world.device)
        for start in range(0, count, size):
            piece = tuple(part[start : start + size].to(self.world.device, non_blocking=True) for part in batch)
            share = len(piece[0]) / count
            last = start + size >= count
            shared = self.called if isinstance(self.called, DistributedDataParallel) else None
            with shared.no_sync() if shared is not None and not last else contextlib.nullcontext():
                loss = self.objective(self.called, piece)
                self.scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * share
        return self.world.mean(total)
