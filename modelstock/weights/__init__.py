"""Weight sets and other people's checkpoints: reading, identity, and what their tensors' names say."""
