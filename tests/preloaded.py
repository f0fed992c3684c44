"""What launch.py's server of ranks imports before it forks them; nothing else imports this."""
# ruff: noqa: F401, E402

import contextlib
import gc

gc.disable()  # as diffclip.base.imports

import deepspeed
import sklearn.metrics
import torch.utils.tensorboard
import torchvision
from PIL import Image
from transformers.integrations import deepspeed as of_transformers

import diffclip.benchmarks.evaluate
import diffclip.hf
import stages.conversations
import stages.pretraining

with contextlib.suppress(ImportError):
    import evaluate.evaluation_suite

with contextlib.suppress(ImportError):
    import lmms_eval.evaluator
Image.init()
gc.freeze()  # else each rank's first collection copies every page
gc.enable()
