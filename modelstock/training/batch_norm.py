"""What a recipe may not ask of a tower with BatchNorm, whose result depends on which images pass together."""

from torch import nn

from modelstock.errors import TrainingError
from modelstock.notices import notice
from modelstock.params import FinetuneParams
from modelstock.training.distributed import World


def check_batch_norm(model: nn.Module, recipe: FinetuneParams, world: World) -> None:
    """Refuse settings under which BatchNorm counts an image twice, or depends on how much memory there is.

    Batches that are divided, into micro-batches or among devices, are normalised in parts, which is a notice; so is
    that running statistics follow the batches also while the rest of the tower is kept as it is.

    Raises:
        TrainingError: such a setting.
    """
    if not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules()):
        return
    if recipe.gradient_checkpointing:
        raise TrainingError(
            "finetune.gradient_checkpointing",
            got="true for a tower with BatchNorm, whose running statistics would count every image twice",
            expected="false",
            cure="set it to false; lower batch_size, or set precision to bfloat16, for memory",
        )
    if recipe.micro_batch == "auto":
        raise TrainingError(
            "finetune.micro_batch",
            got="auto for a tower with BatchNorm, whose result would depend on the memory that is free",
            expected="a number, or null",
            cure="set it",
        )
    if recipe.micro_batch is not None and recipe.micro_batch < recipe.batch_size // world.size:
        notice("finetune.micro_batch", f"BatchNorm normalises {recipe.micro_batch} images at a time, not the batch")
    if recipe.head_first_epochs:
        notice("finetune.head_first_epochs", "BatchNorm's running statistics change too while the head learns alone")
    if world.size > 1:
        share = recipe.batch_size // world.size
        notice("finetune.devices", f"BatchNorm normalises each device's {share} images by themselves, not the batch")
