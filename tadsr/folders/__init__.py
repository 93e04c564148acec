"""Runs over many files: planned, resumable, each image for itself."""
