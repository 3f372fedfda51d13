"""Predicted memory and step time of a training run on a cluster, from formulas; nothing here runs a model.

cluster.py what a GPU and the links between GPUs can do; layouts.py how a model can be cut; weights.py the parameters
that a rank holds; memory.py its bytes; compute.py its work; communication.py its messages; estimate.py memory and step
time of one layout; search.py the best of all layouts; report.py tables and words; plots.py figures; main.py the command.
"""
