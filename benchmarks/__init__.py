"""Figures about pepr-profiler itself, each beside its goal; see README.md."""
