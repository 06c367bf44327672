"""Training-free looped transformers for GGUF models, on llama.cpp."""
