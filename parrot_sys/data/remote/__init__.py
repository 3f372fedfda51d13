"""Files that are not on this machine: whatever fsspec opens, with retries and a bounded cache on disk."""
