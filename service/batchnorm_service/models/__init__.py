"""The models: what a directory offers, what the processes share, and what this process serves."""
