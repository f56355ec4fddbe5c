"""The benchmarks, in their short form."""
