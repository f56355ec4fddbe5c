"""What lbr does, as functions; the command line and Python callers come in here."""
