"""The checks of scripts/gpu_check.py: numbers.py compares results, cost.py measures; device.py places models."""
