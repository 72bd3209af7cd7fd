"""Models: in a directory, in the state that processes share, and in memory."""
