"""The ways out: GGUF files of models and adapters, and how to run them elsewhere."""
