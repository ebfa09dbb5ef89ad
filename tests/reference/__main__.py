"""`python -m tests.reference [--check]`."""

import sys

from tests.reference import main

main(sys.argv[1:])
