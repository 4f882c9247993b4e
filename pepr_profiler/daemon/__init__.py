"""The service: reads privileged counters once, for all users of a machine (docs/daemon.md)."""
