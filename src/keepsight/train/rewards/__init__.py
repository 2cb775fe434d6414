"""Rewards for reinforcement learning, and the comparison of answers they rest on."""

DEFAULT_REWARDS = ("format", "answer")
"""The papers' rewards."""
