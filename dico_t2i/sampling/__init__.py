"""Makes images from weights and prompts."""
