"""The merge methods, as pure functions in one table."""
