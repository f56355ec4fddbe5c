"""The chat adapter."""
