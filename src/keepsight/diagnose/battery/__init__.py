"""Experiments on a memory: take it away, spoil it, exchange it, look inside, and judge."""
