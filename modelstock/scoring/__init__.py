"""Scoring: one pass over a benchmark for many weight sets, and statistics of the data that merges weigh by.

results.py          the results per example of all rows on one benchmark, and their file
outcome.py          what one weight set or ensemble predicts, example by example
score_cache.py      outcomes on disk, whole or so far, named by everything that could change a bit of them
checked_arrays.py   arrays and facts in a file that cannot change unnoticed
decoding.py         batches of decoded examples, and pixels or tokens as towers take them
features.py         a tower's features of a split, in one pass
precision.py        what `auto` means for a pass: the precision that this machine is fast in
batch_norm.py       BatchNorm's running statistics, estimated again
turns.py            turns on a device, for what does not fit it together
memory.py           memory of large activations, kept between layers
one_pass.py         the pass: any number of weight sets, and ensembles of them, on every example once
data_statistics.py  Fisher information, inner products of layer inputs, loss gradients
"""

from modelstock.scoring.results import Row, Scores, load_scores, save_scores

__all__ = ["Row", "Scores", "load_scores", "save_scores"]
