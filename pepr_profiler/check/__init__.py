"""The sensors of this machine, tried under a load whose timing is known."""
