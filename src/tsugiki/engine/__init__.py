"""The engine: tokens in, tokens out, many requests in one forward."""
