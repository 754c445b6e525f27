"""The experiment, written once for the stages and for the command line."""
