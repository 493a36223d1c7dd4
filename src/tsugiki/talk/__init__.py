"""Talking to adapters: `tsugiki generate` and `tsugiki chat`, and finding whom to talk to."""
