"""The merge engine: every method, on files of any size and in memory."""
