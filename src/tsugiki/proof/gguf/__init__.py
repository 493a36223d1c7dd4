"""A GGUF file beside a model, an adapter on one, or another file: as llama.cpp will read it."""
