"""Studies that only a checkout runs: the demo and the experiment, from data to report."""
