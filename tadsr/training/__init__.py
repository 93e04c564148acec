"""Training from scratch and distillation; needs the extra `train`."""
