"""Overlays on upstream packages; only what differs from upstream lives here, at upstream's path."""
