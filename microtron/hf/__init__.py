"""To Hugging Face and back: names, config.json, weights, tokenizer files, upload."""
