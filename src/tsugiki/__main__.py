"""`tsugiki` and `python -m tsugiki`: a verb, under a parent if the kernel may kill it for memory.

The parent imports next to nothing; the child dies with it. Knows no verb.
"""

import atexit
import gc
import os
import sys

from tsugiki import guarding, supervise


def main() -> None:
    """Run the verb here, or in a child that this process watches."""
    # At the end Python looks through all that torch and transformers made, for about a second.
    atexit.register(gc.freeze)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as some services start programs
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if supervise.is_worker():
        supervise.become_worker()
    elif guarding.wants_parent(sys.argv[1:]):
        sys.exit(_watch())
    from tsugiki.cli import main as run

    run()


def _watch() -> int:
    from tsugiki.errors import TsugikiError

    try:
        return guarding.watch(sys.argv[1:])
    except TsugikiError as error:
        from tsugiki.cli import fail

        fail(error)


if __name__ == "__main__":
    main()
