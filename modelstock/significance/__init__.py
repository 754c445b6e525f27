"""The comparison's statistics for anybody's results per example, with the extra `statistics` alone: no torch.

outcomes.py    results of ours, CSV and JSON lines as a table of right and wrong
two_sides.py   one side against the other
"""

from modelstock.significance.outcomes import Columns, Outcomes, read_outcomes
from modelstock.significance.two_sides import Significance, significance

__all__ = ["Columns", "Outcomes", "Significance", "read_outcomes", "significance"]
