"""What is measured of a model while it reads and writes."""
