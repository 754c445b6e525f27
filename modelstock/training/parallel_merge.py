"""Merges of models in training, in place, in one process or across several.

With one process per model, each gets a part of every update, so that of the weights only these parts, the inner
products and the merged parts travel: as much as one all-reduce. Inner products are summed span by span as
`modelstock.merging` sums them, in one order, so both ways, and a merge of the same weights on disk, give the same bits
on CPUs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelstock.merging.kernels import blended, chunks, inner_products, runs
from modelstock.merging.methods.blend import Blend, pair_cosines, summary
from modelstock.merging.rules import RULES, Rule
from modelstock.training.distributed import ALONE, World
from modelstock.weights.layout import is_running_statistic
from modelstock.weights.tensors import StoredTensor, in_memory
from modelstock.weights.weight_set import WeightSet

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]
Report = dict[str, dict[str, Any]]  # tensor -> facts


@dataclass(frozen=True, kw_only=True)
class Span:
    """Values `start` to `stop` of the flat vector of all tensors; they belong to tensor number `tensor`."""

    tensor: int
    start: int
    stop: int


def spans_of(sizes: Sequence[int]) -> list[Span]:
    """Every tensor in the spans that `modelstock.merging` takes it in; none reaches into the next tensor."""
    spans: list[Span] = []
    offset = 0
    for number, size in enumerate(sizes):
        for part in runs(size, 1):
            if part:
                spans.append(Span(tensor=number, start=offset + part[0].start, stop=offset + part[-1].stop))
        offset += size
    return spans


def shares_of(spans: Sequence[Span], processes: int) -> list[list[Span]]:
    """Consecutive spans for each process, about as many values for each."""
    total = spans[-1].stop
    shares: list[list[Span]] = [[] for _ in range(processes)]
    for span in spans:
        shares[min(span.start * processes // total, processes - 1)].append(span)
    return shares


def floating(model: torch.nn.Module) -> Iterator[tuple[Tensor, slice]]:
    """The floating tensors of a model by name, themselves, and where each lies in `flat`."""
    state, start = model.state_dict(), 0
    for name in sorted(state):
        if state[name].is_floating_point():
            yield state[name].detach(), slice(start, start + state[name].numel())
            start += state[name].numel()


def flat(model: torch.nn.Module) -> Tensor:
    """The floating tensors of a model, by name, in one float32 vector on its device."""
    return torch.cat([tensor.reshape(-1) for tensor, _ in floating(model)])


def give_back(model: torch.nn.Module, own: Tensor, share: float) -> None:
    """w <- share * own + (1 - share) * w, in place; `own`: what `flat` gave of the model before a merge."""
    for tensor, place in floating(model):
        # In float64, rounded once: a share of 1 gives `own` back to the last bit, and 0 leaves the merge.
        before = own[place].reshape(tensor.shape).double()
        tensor.copy_(share * before + (1 - share) * tensor.double())


def merge_models(
    origin: WeightSet,
    models: Sequence[torch.nn.Module],
    *,
    rule: Rule = RULES["model_stock"],
    options: Mapping[str, Any] | None = None,
    world: World = ALONE,
) -> Report:
    """Merge this process's models with those of all others by a rule, in place; returns tensor -> facts.

    `origin`: the weights w0 that updates are measured from. `options`: of the rule. Every model gets the merge itself;
    what it keeps of its own is given back by `give_back`.
    BatchNorm's running statistics are averaged; its counters stay each model's own.
    Facts: norms of the updates, cosine (mean over pairs), and the rule's; the same in every process.
    """
    names = sorted(name for name, tensor in origin.tensors.items() if tensor.dtype.kind == "f")
    shares = shares_of(spans_of([origin.tensors[name].size for name in names]), world.size)
    counts = [sum(span.stop - span.start for span in spans) for spans in shares]
    share = _Share(
        spans=shares[world.rank],
        origin=np.concatenate([origin.tensors[name].reshape(-1) for name in names]),
        models=[part.cpu().numpy() for model in models for part in world.exchange(flat(model), counts)],
    )
    grams = _all_inner_products(share, shares, len(names), world)
    # The order by the updates' norms that `modelstock.merging` takes too: a sum then has one order, whichever seed
    # comes first.
    squares = np.diagonal(grams, axis1=1, axis2=2)
    order = sorted(range(len(share.models)), key=lambda i: squares[:, i].tolist())
    grams = grams[:, order][:, :, order]
    mean = Blend(np.full(len(order), 1 / len(order)), {"running statistic": "averaged"})
    blends = [
        mean if is_running_statistic(name) else rule.blend(gram, options or {})
        for name, gram in zip(names, grams, strict=True)
    ]
    merged = share.blended([blend.coefficients for blend in blends], order)
    whole = _joined(merged, counts, world)
    for model in models:
        for tensor, place in floating(model):
            tensor.copy_(whole[place].reshape(tensor.shape))
    return {name: _facts(gram, blend) for name, gram, blend in zip(names, grams, blends, strict=True)}


def _facts(gram: Float64, blend: Blend) -> dict[str, Any]:
    """Norms of a tensor's updates, their mean cosine where none is zero, and what the rule says of it."""
    norms = np.sqrt(np.diag(gram))
    cosine = {"cosine": pair_cosines(gram).mean()} if norms.all() and "running statistic" not in blend.facts else {}
    return {"norms": norms.tolist(), **summary({**cosine, **blend.facts})}


@dataclass(frozen=True, kw_only=True)
class _Share:
    """A process's part of all vectors: its spans, the whole vector of w0, and its part of each model's."""

    spans: Sequence[Span]
    origin: NDArray[Any]
    models: Sequence[Float32]

    @property
    def start(self) -> int:
        """The place in the whole vector of the first value."""
        return self.spans[0].start if self.spans else 0

    def tensors(self, span: Span) -> tuple[StoredTensor, list[StoredTensor]]:
        """The values of w0 in a span, and each model's."""
        part = slice(span.start - self.start, span.stop - self.start)
        arrays = {"": self.origin[span.start : span.stop]} | {str(i): v[part] for i, v in enumerate(self.models)}
        origin, *tuned = in_memory(arrays, {}, "models in training").tensors.values()
        return origin, tuned

    def inner_products(self, span: Span) -> Float64:
        """Those of the updates' values in a span (N, N)."""
        origin, tuned = self.tensors(span)
        products: Float64 = inner_products(origin, tuned, list(chunks(origin.size, 1)))[0]
        return products

    def blended(self, coefficients: Sequence[Float64], order: Sequence[int]) -> Float32:
        """The merged values of all spans; `coefficients`: per tensor, of the models in this order."""
        merged = np.empty(sum(span.stop - span.start for span in self.spans), np.float32)
        for span in self.spans:
            origin, tuned = self.tensors(span)
            at, shares = span.start - self.start, coefficients[span.tensor][None]
            pieces = blended(origin, [tuned[i] for i in order], list(chunks(origin.size, 1)), shares, "F32")
            for start, piece in pieces:
                merged[at + start : at + start + piece.size] = piece
        return merged


def _all_inner_products(share: _Share, shares: Sequence[Sequence[Span]], tensors: int, world: World) -> Float64:
    """Inner products (tensors, N, N): each span's are computed where it is held, then all are summed in one order."""
    count = len(share.models)
    products = torch.zeros(max(len(spans) for spans in shares), count, count, dtype=torch.float64)
    for i, span in enumerate(share.spans):
        products[i] = torch.from_numpy(share.inner_products(span))
    grams = np.zeros((tensors, count, count))
    for spans, gathered in zip(shares, world.gather(products.to(world.device)), strict=True):
        for span, product in zip(spans, gathered.cpu().numpy(), strict=False):
            grams[span.tensor] += product
    return grams


def _joined(merged: Float32, counts: Sequence[int], world: World) -> Tensor:
    """Every process's merged values in one vector."""
    longest = torch.zeros(max(counts), device=world.device)
    longest[: merged.size] = torch.from_numpy(merged).to(world.device)
    return torch.cat([part[:count] for part, count in zip(world.gather(longest), counts, strict=True)])
