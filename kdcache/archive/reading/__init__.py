"""Reading an archive, local or remote. This needs NumPy and no deep-learning framework."""
