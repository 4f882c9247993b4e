"""The node's service: reads privileged counters once, for everybody; see docs/daemon.md."""
