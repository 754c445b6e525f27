"""What becomes of an example before a tower takes it, whatever its modality: framed, put in a batch, and normalised."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from modelstock.data.images import Framing, normalise
from modelstock.data.tokens import Tokenization, Tokens

Decoded = Image.Image | str  # an example as it comes from its file
Framed = NDArray[np.uint8] | Tokens  # as it goes into a batch
Framer = Framing | Tokenization


def modality_of(preprocess: Mapping[str, Any]) -> str:
    """image or text."""
    return str(preprocess.get("modality", "image"))


def framer_of(preprocess: Mapping[str, Any]) -> Framer:
    """What frames an example: an image's pixels (S, S, 3) uint8, or a text's tokens (L,) int64.

    Weight sets with equal framers share the work: `batch` makes one tensor of framed examples.
    """
    return Tokenization.of(preprocess) if modality_of(preprocess) == "text" else Framing.of(preprocess)


def inputs_of(batch: Tensor, preprocess: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
    """What a tower takes, on the batch's device: normalised pixels (B, 3, S, S) of `dtype`, or tokens (B, L) int64."""
    return batch if modality_of(preprocess) == "text" else normalise(batch, preprocess).to(dtype)
