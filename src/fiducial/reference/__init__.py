"""The reference model: the decision, its sources, its records, and its proof."""
