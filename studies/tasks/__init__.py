"""Studies on tasks of more kinds than reading: transfer, compression, text against pixels."""
