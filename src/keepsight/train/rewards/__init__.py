"""Rewards for reinforcement learning, and the comparison of answers they rest on."""
