"""The multimodal model as one object: the network, its processor and, in their settings, the conversation template.

All that asks a model goes through it, so that prompts, placeholders and images are made in one way only.
"""

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
import transformers
from PIL.Image import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)
from transformers.utils import logging

import diffclip.hf
import diffclip.hf.open_clip_vision  # noqa: F401 - registers open_clip's
from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import read_settings, write_json
from diffclip.base.fingerprint import json_digest
from diffclip.base.portable import Portable, write_code
from diffclip.weights import from_pretrained
from mllm import conversation
from mllm.conversation import AUTO, IMAGE, Conversation, Segment, check_image_count, question_turn, render
from mllm.literal import control_tokens, turns_as_text
from mllm.llava import DiffCLIPLlavaForConditionalGeneration
from mllm.own_template import check_end, own_template
from mllm.processing import bounded, check_tokens, never_cut, write_own_template
from mllm.weights import WeightsError, fingerprints, load_strictly, parts, verify

# TRL and vLLM look an architecture up by its name among transformers' own classes, whatever is registered with those
setattr(transformers, DiffCLIPLlavaForConditionalGeneration.__name__, DiffCLIPLlavaForConditionalGeneration)

FINGERPRINTS = "fingerprints.json"  # beside the weights, written last
TRAINED_WITH = (  # settings that change what the same weights compute
    *("vision_feature_layer", "vision_feature_select_strategy", "conversation_template", "projector", "own_logits"),
)
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # options without a meaning in greedy decoding
ORIGIN = (  # say only where a model comes from
    *("_name_or_path", "transformers_version", "architectures", "dtype", "auto_map"),
)


class VisionLanguageModel(NamedTuple):
    """A multimodal model that can be asked about images; unpacks into `model, processor`.

    `load` and `mllm.assemble.assemble` make one. Wherever images are asked for, they are any PIL images, a sequence for
    each conversation, in the order in which it shows them.
    """

    model: DiffCLIPLlavaForConditionalGeneration
    processor: LlavaProcessor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer

    @property
    def template(self) -> str:
        """The conversation format that the model was trained with, as `mllm.conversation.render` takes it."""
        name = self.model.config.conversation_template
        return str(self.processor.chat_template) if name == AUTO else name

    @property
    def end_token(self) -> str:
        """What ends an answer."""
        return str(self.tokenizer.eos_token)

    def use_template(self, template: str) -> str:
        """Ask questions in another template from now on ("plain" has none); "auto" is the language model's own.

        Returns:
            the template as `mllm.conversation.render` takes it.

        Raises:
            InputError: the tokenizer lacks tokens for it, or has no template of its own that can be used.
        """
        if template == "plain":
            return template
        source = template
        if template == AUTO:
            source = own_template(self.tokenizer)
            self.model.generation_config.eos_token_id = write_own_template(self.tokenizer, source)
        check_tokens(self.tokenizer, template, self.tokenizer.name_or_path)
        self.model.config.conversation_template = template
        self.processor.chat_template = conversation.chat_template(source, self.end_token)
        return source

    def to(self, device: torch.device | str) -> "VisionLanguageModel":
        """Move the weights to a device, in place."""
        self.model.to(device)
        return self

    def prompts(self, conversations: Sequence[Conversation]) -> list[str]:
        """Conversations that end with a question, as text up to the answer; see `mllm.conversation.prompt`."""
        control = control_tokens(self.tokenizer)
        return [conversation.prompt(turns, self.template, self.end_token, control) for turns in conversations]

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image]]) -> BatchFeature:
        """The network's inputs for a batch of prompts, on its device.

        Returns:
            input_ids, attention_mask (prompts, tokens) int64, padded on the left; with images, pixel_values (images, 3,
            height, width) in the network's dtype.

        Raises:
            InputError: a prompt shows more or fewer images than it is given.
        """
        for number, (prompt, given) in enumerate(zip(prompts, images, strict=True), 1):
            name = f"conversation {number}: " if len(prompts) > 1 else ""
            check_image_count(prompt.count(IMAGE), len(given), self.template, name)
        count = self.model.config.image_seq_length
        rows = [conversation.encode([Segment(text, False)], self.tokenizer, count)["input_ids"] for text in prompts]
        if not (width := max(map(len, rows))):
            raise InputError("the tokenizer makes no tokens of the text: take the model's tokenizer files again")
        batch = BatchFeature(
            {
                "input_ids": torch.tensor([[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]),
                "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            }
        )
        if any(images):
            batch["pixel_values"] = self.pixels(image for given in images for image in given)
        return batch.to(self.model.device, self.model.dtype)

    def pixels(self, images: Iterable[Image]) -> torch.Tensor:
        """(images, 3, height, width) float32 on the CPU, as the vision tower takes them; at least one image."""
        prepared = bounded(images, self.processor.image_processor)
        return self.processor.image_processor(prepared, return_tensors="pt")["pixel_values"]

    def encode(
        self, turns: Conversation, images: int | None = None, *, ask: bool = False, name: str = ""
    ) -> dict[str, list[int]]:
        """Token ids and labels of one conversation, see `mllm.conversation.encode`; a placeholder for each feature.

        Args:
            images: how many it is given; InputError, which begins with `name`, if it shows more or fewer.
            ask: the last turn is a question; end where the answer begins.
        """
        turns = turns_as_text(turns, control_tokens(self.tokenizer))
        segments = render(turns, self.template, ask, self.end_token)
        if images is not None:
            check_image_count(sum(s.text.count(IMAGE) for s in segments), images, self.template, name)
        return conversation.encode(segments, self.tokenizer, self.model.config.image_seq_length)

    def generate(self, prompts: Sequence[str], images: Sequence[Sequence[Image]], **options: Any) -> list[str]:
        """What the model writes behind each prompt, unstripped; options as in `generation_options`.

        An answer that would go on where the language model has no more positions is cut there, with a warning.
        """
        inputs = self.inputs(prompts, images)
        tokens = generate_within_positions(self.model, inputs, generation_options(options))
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def answer(
        self, conversations: Sequence[Conversation], images: Sequence[Sequence[Image]], **options: Any
    ) -> list[str]:
        """Answers to conversations that end with a question, in one batch; options as in `generate`."""
        return [text.strip() for text in self.generate(self.prompts(conversations), images, **options)]

    def ask(self, question: str, images: Sequence[Image] = (), **options: Any) -> str:
        """The answer to one question, see `mllm.conversation.question_turn`; options as in `generate`."""
        return self.answer([[question_turn(question, len(images))]], [images], **options)[0]

    def stream(self, turns: Conversation, images: Sequence[Image], **options: Any) -> Iterator[str]:
        """Yield the answer to a conversation piece by piece as it is generated; closing the iterator ends it."""
        inputs = self.inputs(self.prompts([turns]), [images])
        yield from stream_text(self.model, self.tokenizer, inputs, generation_options(options))

    def save(self, directory: str | Path) -> None:
        """Write network, processor (padding on the left, for generation) and fingerprints; `load` reads them."""
        directory = Path(directory)
        self.model.save_pretrained(directory)
        self.tokenizer.padding_side = self.tokenizer.init_kwargs["padding_side"] = "left"  # the second is written
        self.processor.save_pretrained(directory)
        if isinstance(self.processor.image_processor, Portable):
            write_code(self.processor.image_processor.portable_classes().values(), directory)
        settings = {name: getattr(self.model.config, name) for name in TRAINED_WITH}
        transform = transform_fingerprint(self.processor)
        prints = {**fingerprints(self.model), "transform": transform, "settings": settings}
        if self.model.config.conversation_template == AUTO:
            prints["chat_template"] = json_digest(self.template)
        write_json(directory / FINGERPRINTS, prints)

    def identity(self) -> str:
        """A short hash of all that decides the answers: weights, dtype, settings, processor."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return json_digest(
            {
                "weights": list(fingerprints(self.model).values()),
                "dtype": str(self.model.dtype),
                "config": _without_origin(self.model.config.to_diff_dict()),
                "generation": _without_origin(self.model.generation_config.to_diff_dict()),
                "transform": transform_fingerprint(self.processor),
                "tokenizer": {**tokenizer, "padding": None, "truncation": None},  # the last call's
                "end": self.tokenizer.eos_token,
                **({"chat_template": self.template} if self.model.config.conversation_template == AUTO else {}),
            }
        )


def generation_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of transformers' `generate` that do what they say; None counts as not given.

    The temperature, where there is one, decides: 0 is greedy and more samples, whatever do_sample says; without one
    do_sample does, and without both it is greedy. max_gen_toks, as some tasks of lmms-eval say, is max_new_tokens.

    Raises:
        InputError: a temperature below 0, or no new tokens.
    """
    result = {name: value for name, value in options.items() if value is not None}
    result.setdefault("max_new_tokens", result.pop("max_gen_toks", 512))
    if result["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens is {result['max_new_tokens']}: an answer needs 1 or more")
    if "temperature" in result:
        temperature = float(result["temperature"])
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature is {temperature}: give 0 for the likeliest words, or more to sample")
        result |= {"temperature": temperature, "do_sample": temperature > 0}
    result["do_sample"] = bool(result.get("do_sample"))
    return {name: value for name, value in result.items() if result["do_sample"] or name not in SAMPLING}


def generate_within_positions(
    model: DiffCLIPLlavaForConditionalGeneration, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> torch.Tensor:
    """(prompts, new tokens) int64: what `model.generate` writes behind the inputs, at most to the last position.

    Raises:
        InputError: the longest prompt alone has more tokens than the language model has positions.
    """
    length, asked = inputs["input_ids"].shape[1], options["max_new_tokens"]
    positions = getattr(model.config.text_config, "max_position_embeddings", None) or math.inf
    room = positions - length + 1  # the last token of an answer is written, but not read
    if room < 1:
        raise InputError(
            f"a prompt has {length:,} tokens with its images, and the language model only {positions:,} positions; "
            "ask a shorter question, about fewer images, or begin a new conversation"
        )
    tokens = model.generate(**inputs, **{**options, "max_new_tokens": min(room, asked)})[:, length:]
    if room < asked and tokens.shape[1] == room:
        ends = torch.as_tensor(model.generation_config.eos_token_id, device=tokens.device)
        if cut := int((~torch.isin(tokens, ends).any(1)).sum()):
            warnings.warn(
                f"{cut} of {len(tokens)} answers cut after {room:,} tokens, at the last of the language model's "
                f"{positions:,} positions",
                stacklevel=2,
            )
    return tokens


def stream_text(
    model: DiffCLIPLlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
) -> Iterator[str]:
    """Yield what `model.generate` writes behind the inputs for one text as it comes; closing the iterator ends it."""
    stopped, failed = Event(), list[BaseException]()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def stop(ids: torch.Tensor, scores: object, **rest: object) -> torch.Tensor:
        return ids.new_full((len(ids),), stopped.is_set(), dtype=torch.bool)

    def generate() -> None:
        try:
            watched = {**options, "streamer": streamer, "stopping_criteria": [stop]}
            generate_within_positions(model, inputs, watched)
        except BaseException as error:  # raised again in the thread that reads
            failed.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    started = False
    try:
        for piece in streamer:
            if piece := piece if started else piece.lstrip():
                started = True
                yield piece
    finally:  # also when whoever reads the pieces stops
        stopped.set()
        thread.join()
    if failed:
        raise failed[0]


def load(
    directory: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = "cpu",
    quiet: bool = False,
) -> VisionLanguageModel:
    """Read what `VisionLanguageModel.save` wrote, in evaluation mode; weights are proven equal to those saved.

    Args:
        directory: a run directory of align or instruct, or a Hub id.
        dtype: cast the weights to this after checking them; by default they stay as stored.
        device: None is the GPU where there is one.
        quiet: have transformers show no progress bars from now on.

    Raises:
        InputError: not such a directory, weights missing or left over, images would be prepared in another way or
            features taken from another layer than in training; no such device.
        WeightsError: the weights differ from those that were saved.
    """
    device = device if isinstance(device, torch.device) else pick_device(device)
    if quiet:
        logging.disable_progress_bar()
    model = load_strictly(AutoModelForImageTextToText, directory, dtype="auto")
    if not isinstance(model, DiffCLIPLlavaForConditionalGeneration):
        raise InputError(f"{directory}: holds a {type(model).__name__}; give a run of align or instruct")
    processor = from_pretrained(AutoProcessor, directory)
    processor.tokenizer.padding_side = "left"  # runs of earlier versions say right
    never_cut(processor.tokenizer)
    if (Path(directory) / FINGERPRINTS).is_file():
        _compare_with_training(model, processor, Path(directory))
        if not hasattr(processor.image_processor, "decoding"):
            processor.image_processor.decoding = 1  # runs made before there were other rules name none
    vlm = VisionLanguageModel(model, processor)
    if model.config.conversation_template == AUTO:
        try:
            check_end(vlm.template)
        except InputError as error:
            raise InputError(f"{directory}: its chat template {error}; take the model from its source again") from None
        write_own_template(processor.tokenizer, vlm.template)  # some classes of tokenizers add their first token again
    model.eval()
    if dtype is not None:
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return vlm.to(device)


def _compare_with_training(
    model: DiffCLIPLlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path
) -> None:
    """Raise InputError or WeightsError unless all is as `FINGERPRINTS` of the directory says."""
    prints = read_settings(directory / FINGERPRINTS)
    settings = prints.pop("settings", {}) if isinstance(prints, dict) else None
    if not isinstance(settings, dict) or not prints.keys() <= {"transform", "chat_template", *parts(model)}:
        raise InputError(f"{directory / FINGERPRINTS}: is damaged; put the file back that the training wrote")
    transform = prints.pop("transform", None)
    if (template := prints.pop("chat_template", None)) and template != json_digest(str(processor.chat_template)):
        raise InputError(
            f"{directory}: its chat_template.jinja is not the one that the model was trained with; put the file back "
            "that the training wrote"
        )
    if "own_logits" not in settings and model.scales_logits():
        raise InputError(
            f"{directory}: trained by an earlier version, which left out how its language model "
            f"({model.config.text_config.model_type}) scales its logits; train it again from the alignment on"
        )
    for name, value in settings.items():
        if (actual := getattr(model.config, name, None)) != value:
            raise InputError(
                f"{directory}: {name} is {actual} in its config.json, but the model was trained with {value}; "
                "put the file back that the training wrote"
            )
    try:
        verify(model, prints)
    except WeightsError as error:
        raise WeightsError(f"{directory}: {error}") from None
    if transform not in (None, transform_fingerprint(processor)):
        raise InputError(
            f"{directory}: its processor_config.json prepares images in another way than the model was trained "
            "with; put the file back that the training wrote"
        )


def transform_fingerprint(processor: LlavaProcessor) -> str:
    """A short hash of all that decides which pixels and how many placeholders an image becomes."""
    images = processor.image_processor
    keys = ("size", "crop_size", "resample", "do_resize", "do_center_crop", "do_pad", "do_rescale", "rescale_factor")
    settings = {key: getattr(images, key, None) for key in (*keys, "do_normalize", "image_mean", "image_std")}
    settings |= {key: dict(settings[key] or {}) for key in ("size", "crop_size")}
    settings |= {key: list(settings[key] or []) for key in ("image_mean", "image_std")}
    if not isinstance(resample := settings["resample"] or 0, int):
        raise InputError(
            f"the image processor's resample is {str(resample)[:60]}, no number: take its file from the source"
        )
    settings["resample"] = int(resample)
    if decoding := getattr(images, "decoding", None):  # runs made before have none
        settings["decoding"] = decoding
    counts = [processor.patch_size, processor.vision_feature_select_strategy, processor.num_additional_image_tokens]
    return json_digest({**settings, "tokens": counts})


def _without_origin(settings: Any) -> Any:
    """Settings without `ORIGIN`, at every depth."""
    if not isinstance(settings, dict):
        return settings
    return {name: _without_origin(value) for name, value in settings.items() if name not in ORIGIN}
