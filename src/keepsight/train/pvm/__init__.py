"""Training a persistent visual memory: supervised fine-tuning and GRPO."""
