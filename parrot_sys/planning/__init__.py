"""Predicted memory and step time of a training run on a cluster, from formulas; nothing here runs a model.

config.py what is asked; cluster.py what GPUs and links can do; job.py the model as it is trained, and a micro-batch;
layouts.py how it can be cut; weights.py the parameters that a rank holds; memory.py its bytes; schedule.py what a
pipeline rank holds at a time; compute.py its work; communication.py its messages; estimate.py memory and step time of
one layout; search.py the best of all layouts; report.py tables and words; plots.py figures; main.py the command.
"""
