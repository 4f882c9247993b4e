"""The runs on disk: made, found, loaded, changed, removed."""
