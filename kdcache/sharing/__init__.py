"""Sharing of archives and trained models: push, pull, publish, sign, export."""
