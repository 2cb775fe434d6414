"""Answers to questions with known answers: memory on and off side by side, and as a model of lmms-eval."""
