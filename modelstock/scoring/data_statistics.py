"""Statistics of the data that some merges weigh by: Fisher information, inner products of layer inputs, loss gradients.

Each is measured for one weight set on examples of the training set (or, for the loss, of the held-out split), in
float64 sums over examples. They come as weight sets, so that they can be saved, named and handed to a merge like any
other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from modelstock.data.dataset import Dataset
from modelstock.data.preprocess import framer_of, inputs_of, modality_of
from modelstock.data.tokens import Tokens
from modelstock.models.towers import Classifier, build_classifier, check_classifier
from modelstock.weights.origin import made_by
from modelstock.weights.weight_set import WeightSet

Images = NDArray[np.uint8]
Framed = Images | Sequence[Tokens]  # images (n, S, S, 3), or n texts as tokens (L,) each


def sample(dataset: Dataset, weights: WeightSet, *, examples: int, seed: int = 0) -> tuple[Any, NDArray[np.int64]]:
    """A random choice of a split's examples, in the shards' order, and their labels (n,).

    Images are (n, S, S, 3) uint8; texts are a list of their tokens (L,) int64, not filled up.

    Raises:
        DataError: labels that are not the head's.
        WeightsError: a tower for another modality, or a head for other classes.
    """
    check_classifier(weights)
    dataset.check_modality(weights)
    dataset.check_classes(weights)
    dataset.check_labels()
    manifest = dataset.manifest
    framer: Any = framer_of(weights.meta["preprocess"])
    rows = np.sort(np.random.default_rng(seed).choice(manifest.count, min(examples, manifest.count), replace=False))
    framed = [framer(dataset.decoded(row)) for row in rows.tolist()]
    return framed if _is_text(weights) else np.stack(framed), dataset.labels[rows]


def _is_text(weights: WeightSet) -> bool:
    return modality_of(weights.meta["preprocess"]) == "text"


def _inputs(examples: Framed, weights: WeightSet, device: str) -> Tensor:
    """What a weight set's tower takes, of a few examples as `sample` gives them."""
    preprocess = weights.meta["preprocess"]
    framer: Any = framer_of(preprocess)
    return inputs_of(framer.batch(examples).to(device), preprocess)


def _statistic(total: Mapping[str, Tensor], weights: WeightSet, *, what: str, examples: int) -> WeightSet:
    """Means over examples of sums over them, as a weight set."""
    how = made_by(stage="statistics", options={}, what=what, examples=examples)
    arrays = {name: (tensor / examples).to(torch.float32).cpu().numpy() for name, tensor in total.items()}
    return WeightSet(arrays, {"of": weights.identity, "made_by": how}, f"{what} of {weights.source}")


def fisher(
    weights: WeightSet, examples: Framed, *, seed: int = 0, batch_size: int = 16, device: str = "cpu"
) -> WeightSet:
    """The diagonal of the Fisher information: mean over examples of the squared gradient of log p(y | x), y ~ p(y | x).

    Labels are drawn from the model itself, as Fisher information asks; the data's own are not looked at. Texts are
    taken one at a time, whatever the `batch_size`: each at its own length, and by models that do not go through vmap.
    Source: Matena, Raffel, arXiv 2111.09832, eq. 4, with one draw per example.
    """
    model = build_classifier(weights).to(device)
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
    slopes = _slopes_of_texts if _is_text(weights) else _slopes_of_images
    for squares in slopes(model, weights, examples, seed=seed, batch_size=batch_size, device=device):
        for name, square in squares.items():
            total[name] += square.double()
    return _statistic(total, weights, what="fisher", examples=len(examples))


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A label (B,) for each row of probabilities (B, C), on their device; drawn on the CPU, alike everywhere."""
    return torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(probabilities.device)


def _slopes_of_images(
    model: Classifier, weights: WeightSet, images: Framed, *, seed: int, batch_size: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Squared gradients by parameter, summed over the images of a batch."""
    state = {name: value.detach() for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def loss(state: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, state, (image[None],))
        return functional.cross_entropy(logits, label[None])

    by_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for start in range(0, len(images), batch_size):
        pixels = _inputs(images[start : start + batch_size], weights, device)
        with torch.no_grad():
            labels = _drawn(model(pixels).softmax(dim=1), generator)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be batched over examples
            slopes = by_example(state, pixels, labels)
        yield {name: slope.square().sum(dim=0) for name, slope in slopes.items()}


def _slopes_of_texts(
    model: Classifier, weights: WeightSet, texts: Framed, *, seed: int, batch_size: int, device: str
) -> Iterator[dict[str, Tensor]]:
    """Squared gradients by parameter, of one text after the other."""
    parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(seed)
    for text in texts:
        logits = model(_inputs([text], weights, device))
        label = _drawn(logits.detach().softmax(dim=1), generator)
        loss = functional.cross_entropy(logits, label)
        slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        yield {name: s.square() for name, s in zip(parameters, slopes, strict=True) if s is not None}


@contextmanager
def _watched(model: nn.Module, seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen(weight's name, inputs (..., in))` for every linear map that a forward pass makes.

    torch's attention applies its output projection without calling it, so its input is made again here.
    """

    def attention(name: str, module: nn.MultiheadAttention) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            query, mask = args[0] if args else keywords["query"], keywords.get("attn_mask")
            seen(f"{name}.in_proj_weight", query)
            x = query if module.batch_first else query.transpose(0, 1)
            q, k, v = (
                part.reshape(*part.shape[:2], module.num_heads, -1).transpose(1, 2)
                for part in functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
            )
            if mask is not None and mask.ndim == 3:
                mask = mask.unflatten(0, (-1, module.num_heads))
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            seen(f"{name}.out_proj.weight", attended.transpose(1, 2).flatten(2))

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
def inner(weights: WeightSet, examples: Framed, *, batch_size: int = 250, device: str = "cpu") -> WeightSet:
    """Inner products X^T X (in, in) of the inputs of every linear layer, over tokens, a mean over examples.

    Attention's packed projection counts as one layer, as in the state dict. Only texts of equal length go together, so
    that no token is there to fill up but where a tower takes all texts at one length.
    Source: Jin et al., RegMean, arXiv 2212.09849, algorithm 1.
    """
    model = build_classifier(weights).to(device)
    total: dict[str, Tensor] = {}

    def seen(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2).double()
        total[name] = total[name] + rows.T @ rows if name in total else rows.T @ rows

    with _watched(model, seen):
        for group in _of_one_length(examples) if _is_text(weights) else [examples]:
            for start in range(0, len(group), batch_size):
                model(_inputs(group[start : start + batch_size], weights, device))
    return _statistic(total, weights, what="inner", examples=len(examples))


def _of_one_length(texts: Framed) -> list[list[Tokens]]:
    """Texts by their number of tokens, the shortest first."""
    groups: dict[int, list[Tokens]] = {}
    for text in texts:
        groups.setdefault(len(text), []).append(text)
    return [groups[length] for length in sorted(groups)]


def loss_gradient(
    examples: Framed, labels: NDArray[np.int64], *, batch_size: int = 250, device: str = "cpu"
) -> Callable[[WeightSet], tuple[float, dict[str, NDArray[np.float32]]]]:
    """A function: weight set -> its mean cross-entropy on these examples and the gradient by tensor name."""

    def of(weights: WeightSet) -> tuple[float, dict[str, NDArray[np.float32]]]:
        model, value = build_classifier(weights).to(device), 0.0
        for start in range(0, len(examples), batch_size):
            inputs = _inputs(examples[start : start + batch_size], weights, device)
            truth = torch.from_numpy(labels[start : start + batch_size]).to(device)
            loss = functional.cross_entropy(model(inputs), truth, reduction="sum") / len(examples)
            loss.backward()  # type: ignore[no-untyped-call]
            value += loss.item()
        slopes = dict(model.named_parameters())
        zeros = {n: np.zeros(v.shape, np.float32) for n, v in weights.tensors.items() if v.dtype.kind == "f"}
        return value, zeros | {n: p.grad.cpu().numpy() for n, p in slopes.items() if p.grad is not None}

    return of
