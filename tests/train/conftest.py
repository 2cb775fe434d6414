"""Fixtures of training and the command line."""

from tiny_training import data, tiny_vlm, trained

__all__ = ["data", "tiny_vlm", "trained"]
