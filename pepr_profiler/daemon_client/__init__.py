"""The daemon of this machine, as its clients use it."""
