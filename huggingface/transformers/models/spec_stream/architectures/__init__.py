"""One file a model family: its configuration with streams, and where the walk finds its parts."""
