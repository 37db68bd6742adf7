"""The kinds of data files that are read, by the endings they are known by."""

KIND_OF = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""A file's ending to its kind, which is what `datasets` calls the builder that reads it."""
KINDS = frozenset(KIND_OF.values())
"""Each may stand as a dataset's path, with the files in `data_files`."""
