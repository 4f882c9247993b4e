"""One run's numbers, from its trace alone."""
