"""The node's daemon as its clients know it."""
