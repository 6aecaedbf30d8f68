"""From text to batches: sources, tokenizers, token shards, and the order they are read in."""
