"""LoRA for the whole life of an adapter, on the machine you have."""
