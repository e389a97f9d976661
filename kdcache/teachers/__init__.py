"""Stage one: teachers are trained, found and run over every view, and their logits are written to an archive."""
