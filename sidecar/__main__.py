"""The `scopegate` command, which `python -m sidecar` is as well."""

import sys

from sidecar import startup


def main() -> None:
    """Run the command that the arguments name."""
    startup.prepare(serving=sys.argv[1:2] == ["run"])
    try:
        from sidecar.cli.main import main as command
    except KeyboardInterrupt:
        sys.stderr.write("\nAborted!\n")  # as commands end once they are imported
        sys.exit(1)
    command(prog_name="scopegate")


if __name__ == "__main__":
    main()
