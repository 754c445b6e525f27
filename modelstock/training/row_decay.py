"""Weight decay of embeddings row by row: in each step, of the rows to which a gradient came.

Most rows of a vocabulary belong to words that no training text has. Plain weight decay would move them all the same, in
every seed alike: a part of the update that no data asked for, and that all seeds agree on.
"""

from typing import Any

import torch
from torch import nn

ROW_DECAY = "row_decay"  # a group's weight decay by row; its `weight_decay` is 0


def embeddings_of(model: nn.Module) -> set[str]:
    """Names of the parameters whose rows belong to words, positions or kinds of tokens."""
    modules = {
        f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    return {name for name, _ in model.named_parameters() if name in modules or name.endswith("positional_embedding")}


@torch.no_grad()
def decay_rows(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Before a step of AdamW: p <- (1 - lr * row_decay) p in rows whose gradient is not all zero, as AdamW does it.

    Source: Loshchilov, Hutter, arXiv 1711.05101, algorithm 2, line 12, for the rows that are in the batch.
    """
    overflow = getattr(optimizer, "found_inf", None)  # a fused optimizer is called for a step that it then skips
    if overflow is not None and bool(overflow):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get(ROW_DECAY) else ():
            if parameter.grad is not None:
                rows = parameter.grad.any(dim=1, keepdim=True)
                parameter.mul_(torch.where(rows, 1 - group["lr"] * group[ROW_DECAY], 1.0))
