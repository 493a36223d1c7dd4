"""File formats of other programs, as pure functions over tensors: GGUF and llama.cpp."""
