"""Statistics of the data that some merges weigh by: Fisher information, inner products of layer inputs, loss gradients.

Each is measured for one weight set on images of the training set (or, for the loss, of the held-out split), in float64
sums over examples. They come as weight sets, so that they can be saved, named and handed to a merge like any other.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from modelstock.data.dataset import Dataset
from modelstock.data.images import Framing, normalise
from modelstock.models.towers import build_classifier, check_classifier
from modelstock.weights.origin import made_by
from modelstock.weights.weight_set import WeightSet

Images = NDArray[np.uint8]


def sample(dataset: Dataset, weights: WeightSet, *, examples: int, seed: int = 0) -> tuple[Images, NDArray[np.int64]]:
    """A random choice of a split's examples, in the shards' order: images (n, S, S, 3) uint8 and labels (n,).

    Raises:
        DataError: labels that are not the head's.
        WeightsError: a head for other classes.
    """
    check_classifier(weights)
    dataset.check_classes(weights)
    dataset.check_labels()
    manifest = dataset.manifest
    framing, count = Framing.of(weights.meta["preprocess"]), min(examples, manifest.count)
    rows = np.sort(np.random.default_rng(seed).choice(manifest.count, count, replace=False))
    return np.stack([framing(dataset.images.cut(row)) for row in rows.tolist()]), dataset.labels[rows]


def _statistic(total: Mapping[str, Tensor], weights: WeightSet, *, what: str, examples: int) -> WeightSet:
    """Means over examples of sums over them, as a weight set."""
    how = made_by(stage="statistics", options={}, what=what, examples=examples)
    arrays = {name: (tensor / examples).to(torch.float32).cpu().numpy() for name, tensor in total.items()}
    return WeightSet(arrays, {"of": weights.identity, "made_by": how}, f"{what} of {weights.source}")


def fisher(
    weights: WeightSet, images: Images, *, seed: int = 0, batch_size: int = 16, device: str = "cpu"
) -> WeightSet:
    """The diagonal of the Fisher information: mean over images of the squared gradient of log p(y | x), y ~ p(y | x).

    Labels are drawn from the model itself, as Fisher information asks; the data's own are not looked at.
    Source: Matena, Raffel, arXiv 2111.09832, eq. 4, with one draw per image.
    """
    model = build_classifier(weights).to(device)
    state = {name: value.detach() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def loss(state: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, state, (image[None],))
        return functional.cross_entropy(logits, label[None])

    by_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in state.items()}
    for start in range(0, len(images), batch_size):
        pixels = normalise(images[start : start + batch_size], weights.meta["preprocess"]).to(device)
        with torch.no_grad():
            probabilities = model(pixels).softmax(dim=1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be batched over examples
            slopes = by_example(state, pixels, labels)
        for name, slope in slopes.items():
            total[name] += slope.square().sum(dim=0).double()
    return _statistic(total, weights, what="fisher", examples=len(images))


@contextmanager
def _watched(model: nn.Module, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen(weight's name, inputs (..., in))` for every linear map that a forward pass makes.

    torch's attention applies its output projection without calling it, so its input is made again here.
    """

    def attention(name: str, module: nn.MultiheadAttention) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            query = args[0] if args else keywords["query"]
            seen(f"{name}.in_proj_weight", query)
            x = query if module.batch_first else query.transpose(0, 1)
            q, k, v = (
                part.reshape(*part.shape[:2], module.num_heads, -1).transpose(1, 2)
                for part in functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
            )
            seen(f"{name}.out_proj.weight", functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        return hook

    def linear(name: str) -> Callable[..., None]:
        return lambda _, args: seen(f"{name}.weight", args[0])

    hooks, inside = [], set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            hooks.append(module.register_forward_pre_hook(attention(name, module), with_kwargs=True))
            inside.add(f"{name}.out_proj")
        elif isinstance(module, nn.Linear) and name not in inside:
            hooks.append(module.register_forward_pre_hook(linear(name)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def inner(weights: WeightSet, images: Images, *, batch_size: int = 250, device: str = "cpu") -> WeightSet:
    """Inner products X^T X (in, in) of the inputs of every linear layer, over images and tokens, a mean over images.

    Attention's packed projection counts as one layer, as in the state dict.
    Source: Jin et al., RegMean, arXiv 2212.09849, algorithm 1.
    """
    model = build_classifier(weights).to(device)
    total: dict[str, Tensor] = {}

    def seen(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2).double()
        total[name] = total[name] + rows.T @ rows if name in total else rows.T @ rows

    with _watched(model, seen):
        for start in range(0, len(images), batch_size):
            model(normalise(images[start : start + batch_size], weights.meta["preprocess"]).to(device))
    return _statistic(total, weights, what="inner", examples=len(images))


def loss_gradient(
    images: Images, labels: NDArray[np.int64], *, batch_size: int = 250, device: str = "cpu"
) -> Callable[[WeightSet], tuple[float, dict[str, NDArray[np.float32]]]]:
    """A function: weight set -> its mean cross-entropy on these examples and the gradient by tensor name."""

    def of(weights: WeightSet) -> tuple[float, dict[str, NDArray[np.float32]]]:
        model, value = build_classifier(weights).to(device), 0.0
        for start in range(0, len(images), batch_size):
            pixels = normalise(images[start : start + batch_size], weights.meta["preprocess"]).to(device)
            truth = torch.from_numpy(labels[start : start + batch_size]).to(device)
            loss = functional.cross_entropy(model(pixels), truth, reduction="sum") / len(images)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        slopes = dict(model.named_parameters())
        zeros = {n: np.zeros(v.shape, np.float32) for n, v in weights.tensors.items() if v.dtype.kind == "f"}
        return value, zeros | {n: p.grad.cpu().numpy() for n, p in slopes.items() if p.grad is not None}

    return of
