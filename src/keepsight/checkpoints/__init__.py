"""Folders and weights: what is loaded, from where, whether it is whole, and how it is written."""
