"""Training from data sets that cannot be indexed first: shard by shard, in an order of their own."""
