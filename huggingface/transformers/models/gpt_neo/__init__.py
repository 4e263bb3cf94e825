"""GPT-Neo with attention on upstream's attention interface."""
