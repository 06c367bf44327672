"""Laws of loss over size, tokens and bits, fitted and judged."""
