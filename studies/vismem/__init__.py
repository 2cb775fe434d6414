"""VisMem's studies: one memory, when to invoke, sizes and forms."""
