"""Files in and out: readers, records, writers."""
