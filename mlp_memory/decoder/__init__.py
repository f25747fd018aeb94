"""The language model: token ids in; next-token logits and a tapped hidden state out.

Pretrained here by `pretrain` (or imported), read by the datastore for keys, and mixed
with the memory by joint training, inference and evaluation.
"""
