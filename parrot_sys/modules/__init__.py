"""Modules with parameters and no Megatron: text-guided MoE, projector, auxiliary losses."""
