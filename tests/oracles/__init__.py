"""Independent ways to what the loop should compute."""
