"""Teaching a memory: data, supervised fine-tuning through TRL, and the blindfold warm-up."""
