"""Archives and trained models on their way to other people: pushed, pulled, published, signed, exported."""
