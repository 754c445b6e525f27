"""The merge engine: every method, on files of any size and in memory.

methods/      the merge methods, one row each
rules.py      what happens at a periodic merge, one row per rule
kernels.py    the two sums every merge is made of, chunk by chunk
checks.py     everything that a merge refuses
plan.py       a merge that was checked and can be carried out
searches.py   coefficients found by scoring merges
engine.py     the first pass, and merges in memory
files.py      merges of files, streamed
"""

from modelstock.merging.engine import merge
from modelstock.merging.files import merge_files
from modelstock.merging.methods.table import METHODS

__all__ = ["METHODS", "merge", "merge_files"]
