"""Reading an archive, from here or elsewhere: NumPy and the layout's library, nothing else."""
