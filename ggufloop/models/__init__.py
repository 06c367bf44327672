"""Model files: their headers, what can loop, and where they come from by name."""
