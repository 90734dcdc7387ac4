"""Zero-shot tasks through lm-eval, the same for a checkpoint, its fake-quant model and its bundle."""
