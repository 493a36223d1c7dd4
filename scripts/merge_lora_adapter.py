#!/usr/bin/env python3
"""The guide's merge command; a thin door to `tsugiki merge`.

    python scripts/merge_lora_adapter.py --adapter models/japanese_chat \
      --base-model google/gemma-3-1b-it --output models/japanese_chat_merged

Knows nothing of merging itself.
"""

import sys

from tsugiki.__main__ import main

NAMES = {"--base-model": "--model", "--output-dir": "--output", "--torch-dtype": "--dtype"}


def as_merge(arguments: list[str]) -> list[str]:
    """The guide's flags as `tsugiki merge`'s; `--adapter X` becomes the argument."""
    found = ["merge"]
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--adapter", "--lora-adapter"):
            found += [value] if equals else []
        else:
            found.append(NAMES.get(name, name) + equals + value)
    return found


if __name__ == "__main__":
    sys.argv = ["tsugiki", *as_merge(sys.argv[1:])]
    main()
