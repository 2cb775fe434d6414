"""The page to try a model on: `/chat`, where the server offers it."""
