"""Rows as people have them → examples as the model sees them, each proven to train something."""
