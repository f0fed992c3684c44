"""transformers' own common tests of models, backbones, image processors and processors, on ours.

A tower, and what is built on it, is tested with ordinary attention and with both kinds of differential attention.
"""

import json
import unittest
from typing import ClassVar

import pytest
import torch
import transformers_suite
from tokenizers import Tokenizer
from transformers import CLIPProcessor, PreTrainedTokenizerFast
from transformers_suite import DTYPE, KERNEL, accept

from diffclip import hf, variants
from diffclip.hf import files
from diffclip.hf.heads import DiffCLIPVisionForImageClassification

pytestmark = pytest.mark.slow  # hundreds of small ones
common = transformers_suite.module("test_modeling_common")
backbones = transformers_suite.module("test_backbone_common")
image_processing = transformers_suite.module("test_image_processing_common")
processing = transformers_suite.module("test_processing_common")
# by these names they know which models have no loss; as transformers' own models stand there
common.MODEL_MAPPING_NAMES = {
    **common.MODEL_MAPPING_NAMES,
    **{config.model_type: f"DiffCLIP{name}Model" for config, name in ((hf.DiffCLIPVisionConfig, "Vision"),)},
    "diffclip_text": "DiffCLIPTextModel",
    "diffclip": "DiffCLIPModel",
}
common.MODEL_FOR_BACKBONE_MAPPING_NAMES = {**common.MODEL_FOR_BACKBONE_MAPPING_NAMES, "diffclip": "DiffCLIPBackbone"}
common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES = {
    **common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "diffclip_vision": "DiffCLIPVisionForImageClassification",
}
PATCHES = {"test_model_get_set_embeddings": "asks for a table of words, as a tower of images has none"}


class VisionTester:
    """What transformers' tests ask for: a tiny configuration of the tower, and input for it."""

    batch_size, num_hidden_layers, hidden_size, image_size, patch_size = 2, 2, 32, 16, 8
    seq_length = (image_size // patch_size) ** 2 + 1
    is_training = True

    def __init__(self, parent, **options):
        self.parent, self.options = parent, options
        self.num_attention_heads = self.get_config().num_attention_maps  # planes of `attentions`

    def get_config(self):
        return hf.DiffCLIPVisionConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=4,
            image_size=self.image_size,
            patch_size=self.patch_size,
            mlp_ratio=2.0,
            num_labels=3,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}


class VisionCase(common.ModelTesterMixin):
    all_model_classes = (hf.DiffCLIPVisionModel, DiffCLIPVisionForImageClassification)
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False
    options: ClassVar[dict] = {}

    def setUp(self):
        self.model_tester = VisionTester(self, **self.options)


@accept(PATCHES)
class TestOrdinary(VisionCase, unittest.TestCase):
    options: ClassVar = {}


@accept(PATCHES)
class TestV1(VisionCase, unittest.TestCase):
    options: ClassVar = {"lambda_init": [0.8, 0.7]}


@accept(PATCHES)
class TestV2(VisionCase, unittest.TestCase):
    options: ClassVar = {"lambda_init": [0.5, 0.4], "attention_version": 2}


@accept(PATCHES)
class TestStopEarly(VisionCase, unittest.TestCase):
    options: ClassVar = {"lambda_init": [0.8, 0.7], "stop_early": True}


class DualTester(VisionTester):
    vocab_size = 60

    def get_config(self):
        text = hf.DiffCLIPTextConfig(
            vocab_size=self.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            bos_token_id=58,
            eos_token_id=59,
            pad_token_id=59,
            **self.options,
        )
        return hf.DiffCLIPConfig(vision_config=super().get_config(), text_config=text, projection_dim=24)

    def __init__(self, parent, **options):
        self.parent, self.options = parent, options
        self.num_attention_heads = self.get_config().text_config.num_attention_maps

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, self.vocab_size - 2, (self.batch_size, 7))
        ids[:, 5:] = self.vocab_size - 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_loss": True}
        pixels = torch.rand(self.batch_size, 3, self.image_size, self.image_size)
        return self.get_config(), {**inputs, "pixel_values": pixels}


class TextTester(DualTester):
    seq_length = 7

    def get_config(self):
        return super().get_config().text_config

    def __init__(self, parent, **options):
        self.parent, self.options = parent, options
        self.num_attention_heads = self.get_config().num_attention_maps

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, {name: inputs[name] for name in ("input_ids", "attention_mask")}


class TextCase(common.ModelTesterMixin):
    all_model_classes = (hf.DiffCLIPTextModel,)
    test_can_init_all_missing_weights_before_2023 = True
    options: ClassVar[dict] = {}

    def setUp(self):
        self.model_tester = TextTester(self, **self.options)


@accept({})
class TestOrdinaryText(TextCase, unittest.TestCase):
    options: ClassVar = {}


@accept({})
class TestTextV1(TextCase, unittest.TestCase):
    options: ClassVar = {"lambda_init": [0.8, 0.7]}


@accept({})
class TestTextV2(TextCase, unittest.TestCase):
    options: ClassVar = {"lambda_init": [0.5, 0.4], "attention_version": 2}


@accept(
    {}, f"{KERNEL}|{DTYPE}|test_hidden_states_output|test_retain_grad_hidden_states"
)  # its towers have states, it has none
class TestDual(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (hf.DiffCLIPModel,)
    test_can_init_all_missing_weights_before_2023 = True
    additional_model_inputs: ClassVar = ["pixel_values"]
    test_resize_embeddings = False
    has_attentions = False
    _is_composite = True

    def setUp(self):
        self.model_tester = DualTester(self, lambda_init=[0.8, 0.7])


class TestBackbone(backbones.BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (hf.DiffCLIPBackbone,)
    config_class = hf.DiffCLIPVisionConfig

    def setUp(self):
        self.model_tester = VisionTester(self, lambda_init=[0.8, 0.7])


class ImageTester(image_processing.ImageProcessingTester):
    def __init__(self, parent):
        size = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 18}}
        super().__init__(parent, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=True, do_center_crop=True, **size)

    def _get_image_processing_classes(self):
        return {"pil": hf.DiffCLIPImageProcessor}


@accept(
    {"test_new_models_require_torchvision_backend": "it resizes with PIL whatever backend is asked for, as in training"}
)
class TestImageProcessor(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester


@accept({})
class TestProcessor(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = CLIPProcessor

    @classmethod
    def _setup_tokenizer(cls):
        """The tokenizer of a run with its first thousand pairs, since saving and loading all takes a second."""
        content = json.loads(files.byte_pairs().to_str())
        words, pairs = content["model"]["vocab"], content["model"]["merges"][:1000]
        kept = [word for word, index in words.items() if index < 512 + len(pairs)]
        content["model"]["merges"] = pairs
        content["model"]["vocab"] = {word: index for index, word in enumerate(kept)}
        for token in content["added_tokens"]:
            token["id"] += len(kept) + 2 - len(words)
            content["model"]["vocab"][token["content"]] = token["id"]
            content["post_processor"]["special_tokens"][token["content"]]["ids"] = [token["id"]]
        tokenizer = Tokenizer.from_str(json.dumps(content))
        config = json.loads(files.tokenizer_files(77)["tokenizer_config.json"])
        settings = {name: value for name, value in config.items() if not name.endswith("_class")}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)

    @classmethod
    def _setup_image_processor(cls):
        return hf.image_processor(variants.MODELS["DiffCLIP-tiny"])
