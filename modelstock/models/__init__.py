"""Towers and heads: building them, pre-trained weights, other people's checkpoints, export."""
