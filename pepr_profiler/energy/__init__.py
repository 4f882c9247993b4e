"""From readings to joules, and whose they are."""
