"""Weight sets and other people's checkpoints: numpy alone, torch only where its own files are opened.

weight_set    a weight set: named arrays and the metadata that says what they are; loading and saving
checkpoints   the one reader of checkpoint files, piece by piece: safetensors, shards, folders, state dicts of torch
tensors       how tensors are stored, read in pieces, identified, and checked for NaN and infinity
differences   what is missing, unknown or of another shape or dtype between the tensors of two models
format        the safetensors format: parsing headers, laying out and writing files
layout        in which block of its network each tensor is, read off its name
origin        how a weight set was made, as its metadata records it
"""

from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.tensors import Checkpoint, StoredTensor
from modelstock.weights.weight_set import WeightSet, load_weights

__all__ = ["Checkpoint", "StoredTensor", "WeightSet", "load_weights", "open_checkpoint"]
