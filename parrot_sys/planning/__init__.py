"""Predicted memory and step time of a training run on a cluster, from formulas; nothing here runs a model.

config.py what is asked; cluster.py what GPUs and links can do; checks.py layouts that can run; weights.py the
parameters that a rank holds; memory.py its bytes; schedule.py what a pipeline rank holds at a time; compute.py its
work; communication.py its messages; estimate.py memory and step time of one layout; search.py the best of all layouts;
report.py tables and words; plots.py figures; main.py the command.

The formulas of the parts of a model are with the systems: a job and its layout in systems/job.py and layout.py, the
decoder in decoder_costs.py, low-rank updates in lora_costs.py, the rest in the costs.py of each system.
"""
