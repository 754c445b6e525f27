"""The training loop, and one module per recipe: pretrain, finetune, periodic. All of it needs torch.

loop.py            one run, step by step, that stops and goes on without changing a bit
callbacks.py       the log, validation, averages along the run, snapshots
resume.py          resume points
job.py             a training job: a folder that can be resumed and is gone once the outputs are written
inputs.py          what seeds are trained from: the anchor and both splits
batches.py         training batches of images by (seed, step), augmented
text_batches.py    training batches of texts by (seed, step), of like length
ahead.py           a thread that makes the next batches while a GPU trains
recipe.py          parameter groups, loss and schedule of fine-tuning
row_decay.py       weight decay of the words that a batch has
validation.py      accuracy on the held-out split while a seed trains
finetune.py        one seed, with its averages and snapshots
periodic.py        seeds merged on the way
parallel_merge.py  merges of models in training, in one process or across several
pretrain.py        the embedded benchmark's tiny CLIP
distributed.py     which of several processes this one is
launcher.py        torchrun, which ends as its processes do
"""
