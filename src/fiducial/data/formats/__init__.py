"""Rows of many shapes to `PreferenceExample`."""
