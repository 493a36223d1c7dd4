"""Adapters: LoRA layers, where they attach, how they start, how they are stored."""
