"""The all-MLP memory: one hidden state in, a next-token distribution out.

Distilled from the sparse kNN targets over the datastore's keys; read by joint training,
inference and evaluation.
"""
