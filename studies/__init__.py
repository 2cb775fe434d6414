"""The evidence: the papers' claims and our own, asked again in small. `python -m studies run`."""
