"""Drawings: read from their packages, which of them are words to learn, painted, laid out as images."""
