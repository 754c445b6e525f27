"""Where tensors are computed on."""

import os

import torch

from modelstock.errors import ParamsError

FORWARD_BATCH = {"cpu": 256, "cuda": 500}  # examples of a batch that a kind of device is fast with; docs/benchmarks.md


def device_kind(device: str) -> str:
    """ "cuda" or "cpu"; "auto" is a GPU where there is one, on which float32 is float32 from here on.

    Raises:
        ParamsError: no such device.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ParamsError("device", got=device, expected="a device that torch can use", cure="set it to cpu or auto")
    if kind == "cuda":
        # By default, convolutions alone round what they multiply to the 10 bits of TF32.
        torch.backends.cudnn.allow_tf32 = False  # torch's newer setting makes torch.compile fail, which reads this one
    return kind


def device_model(kind: str) -> str:
    """What rounds as it does: the GPU and its libraries, or the CPU's instructions; two of one kind may differ.

    `kind`: see `device_kind`.
    """
    if kind == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    # cuBLAS chooses among ways to add up by the memory that it may take.
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "of its own")
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {cudnn}, cuBLAS's workspace {workspace}"


def deterministic(threads: int) -> None:
    """Make torch repeat bit for bit: fixed thread count, deterministic kernels."""
    # cuBLAS repeats only with a workspace of its own; it reads this when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
