"""Programs over language models: several calls that together answer."""
