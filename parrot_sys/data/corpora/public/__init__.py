"""Public data sets in the files they were published as."""
