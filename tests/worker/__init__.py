"""One process that works a queue off."""
