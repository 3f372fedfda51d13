"""From records and pictures to packed batches: reading, formatting, mixing, packing."""
