"""Export for Hugging Face `transformers` and lm-eval."""
