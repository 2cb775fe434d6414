"""A real language model with a small trained eye: made on a CPU from what package registries hold (docs/eye.md)."""
