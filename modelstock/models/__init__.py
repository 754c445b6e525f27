"""Models: towers and heads, pre-trained weights, anchors, other people's checkpoints, export. All of it needs torch.

towers       towers of every kind, built from what a weight set says, and classifiers: tower and head
heads        tokenizers, and the zero-shot head of class names and prompts
pretrained   a CLIP of open_clip by architecture and tag, file, folder, or at random
text_towers  the text side of a CLIP, and encoders of transformers; encoders: what is in the folder of one
timm_models  models of timm
backbone     any of these, by its section of the params
anchor       the anchor w0: a tower with its zero-shot head, and the cache of heads
adopt        somebody's fine-tuned checkpoint as a weight set that merges with an anchor; names: how it names tensors
classify     a weight set as a classifier of pictures or texts; served: the same behind MLflow
export       a weight set as a folder that its tower's library loads, with its head; export_*: by kind; card: its card
"""
