"""What launch.py's server of ranks imports before it forks them; nothing else imports this."""
# ruff: noqa: F401

import gc

import deepspeed
import torch.utils.tensorboard
from PIL import Image
from transformers.integrations import deepspeed as of_transformers

import diffclip.benchmarks.evaluate
import diffclip.hf
import stages.align
import stages.conversations
import stages.instruct
import stages.pretrain
import stages.pretraining

Image.init()
gc.freeze()  # else each rank's first collection copies every page
