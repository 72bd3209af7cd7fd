"""Processes: a server with an orderly end, its supervisor, and the workers."""
