#!/usr/bin/env python3
"""The guide's training command, as written; a thin door to `tsugiki train --preset guide`.

    python scripts/train_lora.py --model google/gemma-3-1b-it --data data/japanese_chat.jsonl \
      --lora-r 16 --lora-alpha 32 --lora-dropout 0.05 --epochs 3 --batch-size 2 \
      --gradient-accumulation-steps 8 --learning-rate 5e-5 --output models/japanese_chat

What is left out comes from the guide (rank 16, rate 5e-5, warm-up 0.3 …), not from the rule that
`tsugiki train` uses. Knows nothing of training itself.
"""

import sys

from tsugiki.__main__ import main


def with_guide_preset(arguments: list[str]) -> list[str]:
    """`train` first, and `--preset guide` unless a preset was named."""
    named = any(a == "--preset" or a.startswith("--preset=") for a in arguments)
    resumed = any(a == "--resume" or a.startswith("--resume=") for a in arguments)
    return ["train", *arguments, *([] if named or resumed else ["--preset", "guide"])]


if __name__ == "__main__":
    sys.argv = ["tsugiki", *with_guide_preset(sys.argv[1:])]
    main()
