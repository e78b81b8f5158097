"""Everything that knows how a model stores and calls its experts."""
