"""Data as they lie somewhere, up to rows: files of any kind, folders and their splits, saved datasets, the hub."""
