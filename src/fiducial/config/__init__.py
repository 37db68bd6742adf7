"""YAML to `RunConfig`. Nothing in this package imports torch."""
