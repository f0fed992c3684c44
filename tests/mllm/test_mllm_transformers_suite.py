"""transformers' own common tests, on the multimodal model, on its processor, and on towers of open_clip."""

import unittest

import pytest
import torch
import transformers_suite
from transformers import LlavaProcessor, Qwen2Config
from transformers_suite import accept

from diffclip import hf, variants
from diffclip.hf.open_clip_vision import OpenClipVisionConfig, OpenClipVisionModel
from mllm.conversation import IMAGE, chat_template
from mllm.llava import DiffCLIPLlavaConfig, DiffCLIPLlavaForConditionalGeneration, DiffCLIPLlavaModel

pytestmark = pytest.mark.slow  # hundreds of small ones
common = transformers_suite.module("test_modeling_common")
processing = transformers_suite.module("test_processing_common")
common.MODEL_MAPPING_NAMES = {
    **common.MODEL_MAPPING_NAMES,
    "open_clip_vision": "OpenClipVisionModel",
    "diffclip_llava": "DiffCLIPLlavaModel",
}
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "diffclip_llava": "DiffCLIPLlavaForConditionalGeneration",
}


class OpenClipTester:
    batch_size, num_hidden_layers, hidden_size, image_size, patch_size = 2, 2, 32, 16, 8
    seq_length, num_attention_heads, is_training = 5, 2, True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        shape = {"image_size": self.image_size, "patch_size": self.patch_size}
        cfg = {**shape, "layers": self.num_hidden_layers, "width": self.hidden_size, "head_width": 16}
        size = {"hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers}
        return OpenClipVisionConfig(embed_dim=16, vision_cfg=cfg, **shape, **size)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}


NO_EMBEDDINGS = "open_clip gives no embeddings, so that hidden_states begin with None"


@accept(
    {
        "test_gradient_checkpointing_enable_disable": "open_clip's blocks are checkpointed by open_clip itself",
        "test_can_init_all_missing_weights": "open_clip draws all of a tower's weights at once, not a module's",
        "test_model_get_set_embeddings": "asks for a table of words, as a tower of images has none",
        "test_hidden_states_output": NO_EMBEDDINGS,
        "test_retain_grad_hidden_states_attentions": NO_EMBEDDINGS,
    }
)
class TestOpenClip(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (OpenClipVisionModel,)
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = OpenClipTester(self)


class LlavaTester:
    """One image of four patches in each of two texts."""

    batch_size, num_hidden_layers, hidden_size, num_attention_heads = 2, 2, 32, 2
    seq_length, vocab_size, image_token, is_training = 10, 60, 5, True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        tower = hf.DiffCLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
            mlp_ratio=2.0,
            lambda_init=[0.8, 0.7],
        )
        text = Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        return DiffCLIPLlavaConfig(
            vision_config=tower, text_config=text, image_token_index=self.image_token, image_seq_length=4
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(6, self.vocab_size, (self.batch_size, self.seq_length))
        ids[:, 2:6] = self.image_token
        pixels = torch.rand(self.batch_size, 3, 16, 16)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@accept({"test_generation_tester_mixin_inheritance": "the suite of generation is not among the sources on PyPI"})
class TestLlava(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DiffCLIPLlavaModel, DiffCLIPLlavaForConditionalGeneration)
    test_can_init_all_missing_weights_before_2023 = True
    test_all_params_have_gradient = False  # the tower's behind the layer that is read have none
    _is_composite = True

    def setUp(self):
        self.model_tester = LlavaTester(self)


@accept({})
class TestLlavaProcessor(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        from transformers import Qwen2Tokenizer

        text = ["Is there a red square in the image? Yes No USER: ASSISTANT:"] * 4
        tokenizer = Qwen2Tokenizer(vocab={}, merges=[]).train_new_from_iterator(text, 400, show_progress=False)
        tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        return tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return hf.image_processor(variants.MODELS["DiffCLIP-tiny"])

    @staticmethod
    def prepare_processor_dict():
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return {**options, "image_token": IMAGE, "chat_template": chat_template("vicuna", "<|endoftext|>")}
