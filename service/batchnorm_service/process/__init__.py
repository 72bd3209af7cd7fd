"""Processes: a server with a graceful shutdown, its supervisor, and the workers."""
