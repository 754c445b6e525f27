"""DVC stages: one file is one reproducible step."""
