"""From rows to packed batches of preference groups."""
