"""Remakes the frozen bases of the miniature world: vision encoder, decoder and tokenizer."""
