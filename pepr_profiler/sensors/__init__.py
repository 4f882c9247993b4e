"""What can be measured on this machine."""
