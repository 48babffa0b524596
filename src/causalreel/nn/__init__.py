"""The network: one DiT, its masks, positions, attention and cache. Knows nothing of training, files or prompts."""
