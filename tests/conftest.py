"""One thread: the tests are small, and several run side by side."""

import torch


torch.set_num_threads(1)
