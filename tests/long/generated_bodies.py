"""Generated JSON bodies and forms, each judged by the gate and read by other parsers. Prints differentials.

    python -m tests.long.generated_bodies [--json 500000] [--forms 500000] [--seed 1]

Half a million of each takes less than ten minutes on one core that is free. Exit code 1 where there is a
differential.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests import deformingforms, differential
from tests.long.generated import check_body, run


def check_form(draw: random.Random) -> tuple[str, list[str]]:
    return differential.of_form(*deformingforms.form(draw))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=int, default=500_000)
    parser.add_argument("--forms", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = run("JSON bodies", check_body, options.json, options.seed)
    found += run("forms", check_form, options.forms, options.seed)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
