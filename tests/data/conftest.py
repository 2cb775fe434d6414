"""Fixtures of data: a small file of images and conversations, and the tiny model that reads it."""

from tiny_training import data, tiny_vlm

__all__ = ["data", "tiny_vlm"]
