"""The one training loop and what it needs: optimizer, checkpoints, metrics, progress.

Every stage that trains (pretrain, distill, joint, baseline) hands it a model, a loss and
batches; it hands back the best checkpoint. Nothing here knows what is being trained.
"""
