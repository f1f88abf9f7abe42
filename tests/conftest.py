"""PAT_HF_DEVICE=cuda runs the tests of generate() on a GPU."""

import os

import torch

from pat_hf import last_layer

torch.set_num_threads(1)  # the models are too small for more
if device := os.environ.get("PAT_HF_DEVICE"):
    torch.set_default_device(device)
last_layer.LEAST = 1  # or no prefill of theirs had enough tokens
