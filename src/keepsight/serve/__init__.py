"""Serving models with memory: an OpenAI-compatible server on the Hugging Face path, and a plugin for vLLM."""
