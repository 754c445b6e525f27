"""Models: towers and heads, pre-trained weights, anchors, other people's checkpoints, export. All of it needs torch.

towers       CLIPs built from open_clip's configs, the benchmark's tiny one, and classifiers: image tower and head
heads        tokenizers, and the zero-shot head of class names and prompts
pretrained   a CLIP of open_clip by architecture and tag, file, folder, or at random
anchor       the anchor w0: an image tower with its zero-shot head, and the cache of heads
adopt        somebody's fine-tuned checkpoint as a weight set that merges with an anchor
export       a weight set as a folder that open_clip loads, with its head and a model card
"""
