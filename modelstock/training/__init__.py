"""The training loop, and one module per recipe: pretrain, finetune, periodic."""
