"""A models.toml as a user might write it."""

OWN = """
[mine]
file = "mine.gguf"
architecture = "qwen3"
layers = 12
sources = [{ hf = "me/mine-GGUF" }]
window = "3:5"
origin = "my sweep"

[qwen3-4b]
file = "other.gguf"
architecture = "qwen3"
layers = 36
sources = [{ hf = "me/other" }]
"""
