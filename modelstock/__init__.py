"""modelstock: fine-tune a CLIP model a few times, merge the results, and know which merge to ship."""

__version__ = "0.1.0"
