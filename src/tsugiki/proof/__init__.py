"""Two artefacts side by side: settings, tensors, token ids, template, logits."""
