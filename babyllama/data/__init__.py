"""Text -> batches of token ids."""
