"""`python -m perennial` is the `perennial` command."""

import sys

from perennial.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
