"""The real llama.cpp, prebuilt, in a process of its own (`process`)."""
