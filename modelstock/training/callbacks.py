"""Callbacks of the training loop: the log, averages of the weights along the run, and snapshots."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from modelstock.files import sha256_of
from modelstock.training.loop import Callback, DamagedPoint, Run


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

    def __init__(self, decay: float, model: torch.nn.Module) -> None:
        self.decay, self.name, self.options = decay, f"ema-{decay}", {"ema_decay": decay}
        start = model.state_dict()
        self._mean = {name: t.detach().clone() for name, t in start.items() if t.is_floating_point()}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def after_step(self, run: Run) -> None:
        """Move toward the weights."""
        weights = floating(run)
        self._update(list(self._mean.values()), [weights[name] for name in self._mean], 0)

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
        """The mean, in float32, on the CPU: a GPU multiplies by the inverse, which may round otherwise.

        A run that resumes after its last step has its sums on the CPU too.
        """
        return {name: (total.cpu() / self._count).float() for name, total in self._sum.items()}

    def state(self) -> dict[str, Any]:
        """The sum so far."""
        return {"sum": self._sum, "count": self._count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back the sum."""
        self._sum, self._count = dict(state["sum"]), state["count"]


class Snapshots(Callback):
    """`write(epoch)` at every epoch's end but the run's last, which is the run's result; it returns the file, if any.

    The file is the same whenever the epoch is done again. A resume point holds the files' sha256: with a snapshot that
    is not what was written, the run goes on from before it.
    """

    def __init__(self, epoch: int, write: Callable[[int], Path | None]) -> None:
        self.epoch, self.write = epoch, write
        self._written: dict[str, str] = {}

    def after_step(self, run: Run) -> None:
        """Write, where an epoch ends."""
        if run.step % self.epoch == 0 and run.step < run.steps and run.world.rank == 0:
            file = self.write(run.step // self.epoch)
            self._written |= {str(file): sha256_of(file)} if file else {}

    def state(self) -> dict[str, Any]:
        """The files, and their sha256."""
        return {"files": dict(self._written)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise DamagedPoint where a file is not as it was written."""
        for file, sha256 in state["files"].items():
            if not Path(file).is_file() or sha256_of(Path(file)) != sha256:
                raise DamagedPoint(f"{file} is not the snapshot that was written")

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back which files there are."""
        self._written = dict(state["files"])
