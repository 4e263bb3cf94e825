"""Model families that differ from upstream, and the streams added to them."""
