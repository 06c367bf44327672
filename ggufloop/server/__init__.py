"""The server behind `ggufloop serve`: an OpenAI-compatible API, and the page at `/`."""
