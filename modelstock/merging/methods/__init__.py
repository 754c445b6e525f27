"""The merge methods, as pure functions in float64, and the table that declares each in one row.

Notation: w0 the anchor, w_i the fine-tuned weights, v_i = w_i - w0 the updates (task vectors), N of them. Every method
gives w0 + scale * u; what differs is u. Exact zeros are handled as cases, never by an epsilon. Three kinds:

- span: u = sum_i c_i v_i, the c_i from the inner products <v_i, v_j> alone: `(gram, *, options) -> Blend`,
  gram (N, N), or (rows, N, N) too where the row declares `batched`.
- values: u looks at single values: `(updates, given, *, options) -> update`, one tensor at a time; `given` are
  generators for methods that draw, statistics of the data for those that weigh.
- search: u = sum_i c_i v_i, the c_i found by scoring: `(count, score, *, options) -> Blend`, or by the gradient of the
  held-out loss: `(start, loss, *, options) -> scales per tensor`.

Modules: `model_stock`, `normal_equations`; `span`, `sparse`, `spectral`, `weighted`, `search`, a kind or family each;
`rows`, what a row declares; `table`, the rows; `blend`, coefficients and cosines.
"""

from modelstock.merging.methods.rows import Choice, Method, Option, Style
from modelstock.merging.methods.table import METHODS, find_method

__all__ = ["METHODS", "Choice", "Method", "Option", "Style", "find_method"]
