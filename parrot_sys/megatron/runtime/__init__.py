"""Megatron-Core as it runs here: set-up, differences of its versions, the CPU layer, schedules and optimizers."""
