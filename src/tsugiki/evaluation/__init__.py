"""How good an adapter is at its task, beside baselines that need no training."""
