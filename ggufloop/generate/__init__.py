"""Text out of a model: sampling, chat, diffusion."""
