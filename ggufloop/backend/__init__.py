"""llama.cpp: the patched library, how it is built, checked and chosen, and what Python calls of it."""
