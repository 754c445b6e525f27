"""Where runs are recorded: files are the record, a tracker mirrors them."""
