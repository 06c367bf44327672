"""Questions that need no network, and the YAML by which lm-eval reads them."""
