"""``python -m dstack_lab``: the verbs of `cli`, guarded while they are imported."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; return the exit status. Imports take half a second, in which Ctrl-C is no traceback either."""
    try:
        from dstack_lab import cli

        return cli.main(arguments)
    except KeyboardInterrupt:
        print("dstack_lab: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
