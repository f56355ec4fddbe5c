"""Nothing is lost or done twice: kills, faults, all interleavings."""
