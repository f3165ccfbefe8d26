import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

settings.register_profile("fn", deadline=None, derandomize=True, print_blob=True, max_examples=50)
settings.load_profile("fn")
torch.set_num_threads(1)
