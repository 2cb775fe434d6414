"""The engine on the Hugging Face path: continuous batching over one model."""
