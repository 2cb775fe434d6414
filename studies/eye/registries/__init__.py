"""What comes from package registries: which packages, and how they are fetched and checked."""
