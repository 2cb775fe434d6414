"""Training a latent vision memory: warm start, formation and invocation."""
