"""What a model can do, in figures: multiple choice, bits per byte, lm-evaluation-harness."""
