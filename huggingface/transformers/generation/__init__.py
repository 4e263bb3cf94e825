"""Generation with draft trees: `generate`, prefill, the decode loop and its parts."""
