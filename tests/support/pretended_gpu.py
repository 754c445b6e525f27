"""A GPU that is not there: tensors have shapes, dtypes and a device but no values, and meet only on one device.

What runs on it to its end makes no operation on tensors of two devices; the numbers it gives mean nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Ones(TorchDispatchMode):
    """Gives 1 wherever the value of a tensor is asked for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        return function(*args, **(kwargs or {}))


def _backward(self: Tensor) -> None:
    """Tensor.backward with gradients of ones: torch's own asks the GPU for a stream."""
    todo, seen = [self.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.ones_like(node.variable)
        todo += [following for following, _ in node.next_functions]


def _grad(outputs: Any, inputs: Any, *_: Any, **__: Any) -> Any:
    """What torch.func.grad calls, in the same way."""
    return tuple(map(torch.ones_like, inputs))


def _to_numpy(self: Tensor, *args: Any, original: Any = Tensor.numpy, **options: Any) -> NDArray[Any]:
    """Ones for a tensor without values, and torch's own refusal of one on a GPU."""
    if not isinstance(self, FakeTensor):
        return original(self, *args, **options)
    if self.device.type != "cpu":
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    return np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply with new parameters, since torch cannot swap those without values."""
    for module in self.modules() if recurse else [self]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                changed = function(parameter.detach())
                module._parameters[name] = nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = function(buffer)
    return self


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it, `cuda` is a device of torch with 16 GiB."""
    with FakeTensorMode(allow_non_fake_inputs=True), _Ones(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeTensorMode, "avoid_device_init", property(lambda self: True))
        patch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        patch.setattr(Tensor, "numpy", _to_numpy)
        patch.setattr(Tensor, "backward", _backward)
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self)
        patch.setattr("torch._functorch.eager_transforms._autograd_grad", _grad)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 34, 1 << 34))
        patch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda: 0)
        patch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
        patch.setattr(torch.backends.cudnn, "version", lambda: 0)
        yield
