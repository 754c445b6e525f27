"""From images or texts on disk, or drawn images, to shards, and from shards to examples.

shapes/         the embedded benchmark: its names, its renderer, its splits
layouts.py      data sets as they are published: one entry each
tables.py       tables of texts, row by row
text_sources.py texts on disk: which rows or files, and what label each has
containers.py   folders and archives as lists of files, read where they are
tars.py         the one reader of tar archives
preparation.py  a split made into shards, by several processes, resumed
shards.py       webdataset shards whose bytes repeat
manifest.py     the manifest of a split, and the check of its shards
index.py        which image or text and which label of a shard belong together
dataset.py      a folder of shards, opened and verified once per process, and passed on as an object
examples.py     images or texts with labels by row
decoder.py      the one place that decodes images
texts.py        the one place that decodes texts
images.py       images framed and normalised as a tower takes them
classes.py      what a head tells apart: names, folders, prompts
"""
