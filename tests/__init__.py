"""The tests of lbr: real databases, processes, signals and HTTP servers."""
