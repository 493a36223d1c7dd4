#!/usr/bin/env python3
"""The guide's conversion command; a thin door to `tsugiki export`.

    python scripts/convert_to_gguf.py models/japanese_chat_merged \
      --outfile models/japanese_chat-f16.gguf --outtype f16 --quantize Q4_K_M

Knows nothing of converting itself. --quantize adds a file of that type; it may be repeated.
"""

import sys

from tsugiki.__main__ import main

NAMES = {
    "--outfile": "--output", "--output-dir": "--output", "--quantize": "--gguf",
    "--outtype": "--gguf", "--base-model": "--model",
}  # fmt: skip
SOURCES = ("--model-dir", "--input", "--adapter")


def as_export(arguments: list[str]) -> list[str]:
    """The guide's flags as `tsugiki export`'s; f16 where no --outtype says another."""
    found, first = ["export"], ["--gguf", "f16"]
    words = iter(arguments)
    for argument in words:
        name, equals, value = argument.partition("=")
        if name in SOURCES:
            found += [value] if equals else []
        elif name == "--outtype":
            first = ["--gguf", value if equals else next(words, "")]
        else:
            found.append(NAMES.get(name, name) + equals + value)
    asks = any(word in ("-h", "--help") for word in arguments)
    return found if asks else [found[0], *first, *found[1:]]


if __name__ == "__main__":
    sys.argv = ["tsugiki", *as_export(sys.argv[1:])]
    main()
