"""From results per example to a comparison with error bars, its report and its figures.

Modules: `metrics`, one row each; `crossed`, variances over seeds and images; `intervals`, Wilson's and those of means;
`differences`, what is said of a difference; `paired_tests`, McNemar with Holm; `compare`, everything together; `report`
and `figures`, what it looks like; `published`, others' figures. modelstock.significance has the statistics of these
without their libraries, so this file imports nothing.
"""
