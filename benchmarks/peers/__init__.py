"""This project beside the tools that people use today: same machine, same simulated hardware."""
