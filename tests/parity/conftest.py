import os

# Before anything imports the hub's client: nothing here may fetch.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
