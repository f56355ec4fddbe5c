"""The queue, on real databases."""
