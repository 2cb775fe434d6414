"""PVM's studies: reading by length, ablations, and refinement by GRPO."""
