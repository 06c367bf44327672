"""Files of fewer bits: llama.cpp's quantiser, importance matrices, the noise they bring."""
