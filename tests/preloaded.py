"""What launch.py's server of ranks imports before it forks them; nothing else imports this."""
# ruff: noqa: F401, E402

import contextlib
import gc

gc.disable()  # as diffclip.base.imports

import deepspeed
import sklearn.metrics
import torch.utils.tensorboard
import torchvision
import yaml
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

if hasattr(yaml, "CFullLoader"):  # lmms-eval parses its 3,000 task files at each start: 1 s instead of 6

    class Loader(yaml.CFullLoader):
        def __init__(self, stream):
            self.name = getattr(stream, "name", "<text>")  # which lmms-eval asks for, and C's parser keeps to itself
            super().__init__(stream)

    yaml.FullLoader = yaml.loader.FullLoader = Loader
Image.init()
gc.freeze()  # else each rank's first collection copies every page
gc.enable()
