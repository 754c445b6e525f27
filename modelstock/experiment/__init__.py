"""The experiment, written once for the stages and for the command line.

paths.py      where weight sets, results and reports are
left_over.py  what earlier settings have left, removed
subsets.py    which seeds merge together
rows.py       what a weight set is called in tables
merge.py      merges of the subsets by one method, its options chosen on the held-out split
evaluate.py   all weight sets and ensembles on one benchmark
updates.py    how the seeds' updates lie to each other
compare.py    the comparison of all rows, and the report
"""
