"""Token ids -> more token ids."""
