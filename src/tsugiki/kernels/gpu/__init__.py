"""Triton bodies of the operations of kernels/: same signatures, the plain bodies judge them.

Importing a module of this folder needs triton; `kernels/backend.py` alone decides whether one is.
"""
