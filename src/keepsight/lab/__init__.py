"""The laboratory: a small VLM that can be pretrained in a minute, and honest questions to put to it."""
