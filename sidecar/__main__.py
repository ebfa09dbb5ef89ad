"""`python -m sidecar` is the `scopegate` command."""

from sidecar.cli.main import main

if __name__ == "__main__":
    main(prog_name="scopegate")
