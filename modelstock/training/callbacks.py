"""Callbacks of the training loop: the log, validation, averages along the run, snapshots and resume points."""

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelstock.errors import TrainingError
from modelstock.files import atomic_path
from modelstock.training.loop import Callback, Run

SAVE_EVERY_S = 20.0  # a resume point of the tiny tower takes 0.03 s
SAVE_SHARE = 0.02  # at most this share of the time goes into resume points, however large the model


def floating(run: Run) -> dict[str, Tensor]:
    """The model's floating tensors by name, which is what an average is made of."""
    return {name: tensor for name, tensor in run.model.state_dict().items() if tensor.is_floating_point()}


class Log(Callback):
    """A row of loss, learning rate and gradient norm every `every` steps, and every `epoch` steps.

    It is the last batch's loss: a mean since the last row would depend on where a run resumed.
    """

    def __init__(self, every: int, epoch: int) -> None:
        self.every, self.epoch = every, epoch

    def after_step(self, run: Run) -> None:
        """Log, where it is time."""
        if run.step % self.every == 0 or run.step % self.epoch == 0:
            run.log(run.last)


class Validation(Callback):
    """A row of what `measure` finds, the model in evaluation mode, every `epoch` steps."""

    def __init__(self, epoch: int, measure: Callable[[], Mapping[str, float]]) -> None:
        self.epoch, self.measure = epoch, measure

    def after_step(self, run: Run) -> None:
        """Measure, where it is time."""
        if run.step % self.epoch == 0 and run.world.rank == 0:
            run.model.eval()
            run.log(self.measure())


class Average(Callback):
    """A mean of the weights along the run, which is a weight set of its own."""

    name: str
    options: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """The averaged floating tensors by name."""
        raise NotImplementedError


class Ema(Average):
    """e_0 = w_0, e_s = decay e_{s-1} + (1 - decay) w_s after every step, in the weights' dtype.

    Source: Polyak, Juditsky, SIAM J. Control Optim. 30 (1992), with Ruppert's exponential weights.
    """

    def __init__(self, decay: float, run_model: torch.nn.Module) -> None:
        self.decay, self.name, self.options = decay, f"ema-{decay}", {"ema_decay": decay}
        start = run_model.state_dict()
        self._mean = {name: t.detach().clone() for name, t in start.items() if t.is_floating_point()}

    def after_step(self, run: Run) -> None:
        """Move toward the weights."""
        now = floating(run)
        torch._foreach_lerp_(list(self._mean.values()), [now[name] for name in self._mean], 1 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """The mean so far."""
        return self._mean

    def state(self) -> dict[str, Any]:
        """The mean so far."""
        return self._mean

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back the mean."""
        for name, tensor in self._mean.items():
            tensor.copy_(state[name])


class Lawa(Average):
    """The mean of the weights at the ends of the last `last` epochs, the run's last step among them.

    Only what is in that mean is summed, in float64, so nothing is kept before the last epochs.
    Source: Kaddour, arXiv 2209.14981.
    """

    def __init__(self, last: int, epoch: int, steps: int) -> None:
        self.last, self.epoch, self.first = last, epoch, steps - (last - 1) * epoch
        self.name, self.options = "lawa", {"lawa_last": last}
        self._sum: dict[str, Tensor] = {}
        self._count = 0

    def after_step(self, run: Run) -> None:
        """Add the weights, where an epoch that counts ends."""
        if run.step >= self.first and (run.steps - run.step) % self.epoch == 0:
            for name, tensor in floating(run).items():
                wide = tensor.detach().double()
                self._sum[name] = self._sum[name].to(tensor.device) + wide if name in self._sum else wide.clone()
            self._count += 1

    def tensors(self) -> dict[str, Tensor]:
        """The mean, in float32."""
        return {name: (total / self._count).float() for name, total in self._sum.items()}

    def state(self) -> dict[str, Any]:
        """The sum so far."""
        return {"sum": self._sum, "count": self._count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back the sum."""
        self._sum, self._count = dict(state["sum"]), state["count"]


class Snapshots(Callback):
    """`write(epoch)` at every epoch's end but the run's last, which is the run's result.

    It writes a file of its own, the same whenever the epoch is done again; so there is no state.
    """

    def __init__(self, epoch: int, write: Callable[[int], None]) -> None:
        self.epoch, self.write = epoch, write

    def after_step(self, run: Run) -> None:
        """Write, where an epoch ends."""
        if run.step % self.epoch == 0 and run.step < run.steps and run.world.rank == 0:
            self.write(run.step // self.epoch)


def write_growing_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write `history.jsonl`, which others follow while a run trains."""
    with atomic_path(folder / "history.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a resume point, whole or not at all."""
    # What a killed process left half-written is of no use, and may be large.
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        torch.save(dict(state), temporary)


def read_state(path: Path) -> dict[str, Any]:
    """Read a resume point; nothing in it is executed.

    Raises:
        TrainingError: a damaged file.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TrainingError(
            path,
            got=f"{path.stat().st_size} bytes that are no resume point ({re.split(r'[.:]', str(error))[0]})",
            expected="a whole file",
            cure="remove it: the run then starts at its first step and ends with the same bytes",
        ) from error
    return state


class Clock:
    """Says when the next resume point is due: `every` seconds after the last, and `SAVE_SHARE` of the time at most."""

    def __init__(self) -> None:
        self._done, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._done > max(SAVE_EVERY_S, self._cost / SAVE_SHARE if SAVE_EVERY_S > 0 else 0)

    def time(self, save: Callable[[], None]) -> None:
        """Save, and remember what it cost."""
        begun = time.monotonic()
        save()
        self._done = time.monotonic()
        self._cost = self._done - begun


class ResumePoint(Callback):
    """Writes `state.pt` and `history.jsonl` to a folder now and then and at the end. It must be the last callback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._clock = folder, Clock()

    def resume(self, run: Run) -> None:
        """Go on from the folder's resume point, where there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        point = self.folder / "state.pt"
        if point.exists():
            run.load_state(read_state(point))
        if run.world.rank == 0:
            write_growing_history(self.folder, run.history)

    def after_step(self, run: Run) -> None:
        """Save, where it is time; under several processes, the first saves what all of them hold."""
        if run.world.rank == 0 and (run.step == run.steps or self._clock.due()):
            self._clock.time(lambda: self._save(run))

    def _save(self, run: Run) -> None:
        write_state(self.folder / "state.pt", run.state())
        write_growing_history(self.folder, run.history)
        run.saved_step = run.step
