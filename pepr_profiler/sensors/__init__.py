"""What can be measured on this machine, and how the rest is unlocked."""
