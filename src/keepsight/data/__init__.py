"""Conversations about images, read from whatever people have and checked before any long work."""
