"""An archive on disk: the manifest, the rows, and the store that reads and writes files by name."""
