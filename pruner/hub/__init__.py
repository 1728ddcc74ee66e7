"""The Hugging Face Hub: Hub ids as sources, and asking it."""
