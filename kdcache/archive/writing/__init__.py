"""Writing an archive, and making archives from archives."""
