"""Base models: their shapes, names and identity, how they are loaded and called flat."""
