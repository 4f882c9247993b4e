"""Runs on disk: found, loaded, changed, removed."""
