"""The two halves of train.py, and how they are timed."""
