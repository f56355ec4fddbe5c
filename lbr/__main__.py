"""`python -m lbr` is the command `lbr`."""

from lbr.cli import main

if __name__ == "__main__":
    main()
