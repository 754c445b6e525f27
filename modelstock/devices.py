"""Where tensors are computed on."""

import torch

from modelstock.errors import ParamsError


def device_kind(device: str) -> str:
    """ "cuda" or "cpu"; "auto" is a GPU where there is one.

    Raises:
        ParamsError: no such device.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ParamsError("device", got=device, expected="a device that torch can use", cure="set it to cpu or auto")
    return kind
