"""Where fine-tuned weights lie: norms, angles, the shell around a centre, and what that means for merging.

claims.py           a claim of the paper, or an open question, with what was measured of it
groups.py           types of tensors and blocks, by names and shapes
one_pass.py         the pass over the files: inner products and random projections
measure.py          what is measured of an anchor, seeds and a centre
steps.py            the same at every step, of snapshots
stack.py            inner products of many tensors, and intervals over seeds
shell.py            norms, angles, lengths of means, the formula's ratio
centre.py           the centre, the ratio that would be right, residuals
weight_claims.py    the claims that weights decide
tables.py           rows per tensor, type, block and model
figures.py          pictures, with matplotlib
page.py             the files of a measurement
space.py            blends of the seeds, and distances from their centre
points.py           weight sets that are scored for the geometry alone
accuracy.py         accuracies of rows, with intervals over images and seeds
accuracy_claims.py  the claims that accuracies decide
questions.py        what the paper leaves open: costs, choices, ratios, where merging fails
accuracy_figures.py pictures of where accurate weights lie

What is measured from weights alone needs neither torch nor a model, and any checkpoint will do; what accuracies decide
needs rows that were scored.
"""

from modelstock.geometry.claims import Claim, Quantity, claims_table
from modelstock.geometry.measure import Geometry, measure, measure_files
from modelstock.geometry.page import write_geometry
from modelstock.geometry.steps import measure_steps
from modelstock.geometry.weight_claims import weight_claims

__all__ = [
    "Claim",
    "Geometry",
    "Quantity",
    "claims_table",
    "measure",
    "measure_files",
    "measure_steps",
    "weight_claims",
    "write_geometry",
]
