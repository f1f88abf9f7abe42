"""PAT_HF_DEVICE=cuda runs the tests of generate() on a GPU."""

import os

import torch

if device := os.environ.get("PAT_HF_DEVICE"):
    torch.set_default_device(device)
