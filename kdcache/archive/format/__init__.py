"""What an archive is on disk: its manifest, its rows, and its bytes by name."""
