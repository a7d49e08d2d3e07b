"""One module per reader; see tests.fuzz."""
