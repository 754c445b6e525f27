"""The embedded benchmark `shapes`: its renderer, and the splits that a reference model helps to draw."""
