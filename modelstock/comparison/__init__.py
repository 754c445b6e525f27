"""From results per example to a comparison with error bars, its report and its figures."""
