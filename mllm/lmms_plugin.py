"""Our models for lmms-eval: `lmms_eval --model diffclip_llava --model_args pretrained=RUN --tasks pope`.

Prompts are built from the conversation template that the model was trained with, never from a chat template that
lmms-eval or the tokenizer might bring along.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import EpsImagePlugin, Image
from tqdm import tqdm

from diffclip.fingerprint import fingerprint
from diffclip.pictures import to_rgb
from mllm.chat import prompts, question_turn, write
from mllm.conversation import IGNORE, IMAGE, encode, render
from mllm.examples import collate, image_tokens
from mllm.image_modes import bounded
from mllm.model import load, parts

PROGRESS = "diffclip_llava"  # what the progress bar begins with
EpsImagePlugin.gs_binary = False  # `datasets` decodes the tasks' images: none of them is a program for Ghostscript


def manifest() -> ModelManifest:
    """The entry point through which lmms-eval finds the model."""
    return ModelManifest(model_id="diffclip_llava", simple_class_path="mllm.lmms_plugin.DiffCLIPLlavaForEvaluation")


class DiffCLIPLlavaForEvaluation(lmms):
    """A run of stages.instruct (or align), answering in batches on one or several processes."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | str | None = None,
        answers: str | None = None,
    ) -> None:
        """
        Args:
            pretrained: a run directory or Hub id.
            batch_size: questions at a time, per process.
            device: e.g. "cuda:0"; by default the process's own.
            dtype: "bfloat16", "float32", ...; by default as stored.
            max_batch_size: given by lmms-eval, of no use here.
            answers: a file that generated answers are added to as they come (with the rank behind its name); the same
                command, started again after a kill, takes them from there.
        """
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        model, self.processor = load(pretrained, dtype=getattr(torch, dtype) if dtype else None)
        self.model = model.to(self.device)
        self.template = model.config.conversation_template
        self.batch_size = int(batch_size)
        self.answers = Path(answers) if answers else None
        self.weights = "".join(map(fingerprint, parts(model).values())) if answers else ""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; greedy unless the task asks to sample.

        A question asked twice about the same picture, as POPE's three splits do, is answered once.
        """
        answers = Kept(self.answers, self.weights, self._rank)  # by options, prompt and pictures
        keys: list[tuple] = [()] * len(requests)
        waiting: dict[tuple, list[Image.Image]] = {}
        for i in self._in_order(requests):
            context, options, doc_to_visual, doc_id, task, split = requests[i].args
            pictures = self._pictures(doc_to_visual, doc_id, task, split)
            seen = tuple(hashlib.sha256(p.tobytes()).digest() for p in pictures)
            keys[i] = (json.dumps(options, sort_keys=True), self._prompt(context, len(pictures)), seen)
            if _samples(options):
                keys[i] += (i,)
            if keys[i] in answers or keys[i] in waiting:
                continue
            if waiting and (len(waiting) == self.batch_size or next(iter(waiting))[0] != keys[i][0]):
                answers.add(self._answer(waiting))
                waiting = {}
            waiting[keys[i]] = pictures
        answers.add(self._answer(waiting))
        return [answers[key] for key in keys]

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, without the end token, and whether greedy decoding writes it."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        tokens, batch = image_tokens(self.processor), collate(self.processor)
        order = list(self._in_order(requests))
        for start in range(0, len(order), self.batch_size):
            members, examples = order[start : start + self.batch_size], []
            for i in members:
                context, target, doc_to_visual, doc_id, task, split = requests[i].args
                answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
                shown = self._pictures(doc_to_visual, doc_id, task, split)
                turns = [question_turn(context, len(shown)), {"from": "gpt", "value": answer.strip()}]
                end = self.processor.tokenizer.eos_token
                encoded = encode(render(turns, self.template, end_token=end), self.processor.tokenizer, tokens)
                example = {name: torch.tensor(ids) for name, ids in encoded.items()}
                last = example["labels"].ne(IGNORE).nonzero()[-1]
                example["labels"][last] = IGNORE  # the end token is no part of the continuation
                if shown:
                    example["pixel_values"] = self._pixels(shown)
                examples.append(example)
            inputs = {name: tensor.to(self.device) for name, tensor in batch(examples).items()}
            labels = inputs.pop("labels")[:, 1:]  # (batch, tokens - 1)
            logits = self.model(**inputs).logits[:, :-1].float()  # (batch, tokens - 1, vocabulary)
            learnt = labels != IGNORE
            chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            greedy = ((logits.argmax(-1) == labels) | ~learnt).all(1)
            for i, value, is_greedy in zip(members, (chosen * learnt).sum(1), greedy):
                results[i] = (float(value), bool(is_greedy))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise RuntimeError("diffclip_llava answers tasks of one round only")

    def _in_order(self, requests: list[Instance]) -> Iterator[int]:
        """Indices of the requests, those with equal options together and the longest first, under a bar."""
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        yield from tqdm(order, desc=PROGRESS, unit="question", disable=self.rank != 0)

    def _pictures(
        self, doc_to_visual: Callable[[dict], list | None], doc_id: int, task: str, split: str
    ) -> list[Image.Image]:
        # before the task's own convert("RGB"), which would lay transparency over black and cut 16 bits at 255
        pictures = list(doc_to_visual(_in_rgb(self.task_dict[task][split][doc_id])) or [])
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise ValueError(f"task {task} shows something that is no picture; diffclip_llava sees pictures only")
        return [to_rgb(picture) for picture in pictures]

    def _prompt(self, context: str, pictures: int) -> str:
        (text,) = prompts(self.model, self.processor, [[question_turn(context, pictures)]])
        if text.count(IMAGE) != pictures:
            raise ValueError(f"template {self.template} shows {text.count(IMAGE)} of {pictures} pictures")
        return text

    def _pixels(self, pictures: list[Image.Image]) -> torch.Tensor:
        images = bounded(pictures, self.processor.image_processor)
        pixels = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.dtype)

    def _answer(self, waiting: dict[tuple, list[Image.Image]]) -> dict[tuple, str]:
        """Answers to one batch of (options, prompt, ...) keys with their pictures."""
        if not waiting:
            return {}
        options = json.loads(next(iter(waiting))[0])
        pictures = [picture for shown in waiting.values() for picture in shown]
        sample = _samples(options)
        texts = write(
            self.model,
            self.processor,
            [key[1] for key in waiting],
            pictures,
            max_new_tokens=options.get("max_new_tokens", 1024),
            num_beams=options.get("num_beams") or 1,
            do_sample=sample,
            **({k: options[k] for k in ("temperature", "top_p") if options.get(k)} if sample else {}),
        )
        stops = options.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return dict(zip(waiting, (text.strip() for text in texts)))


class Kept(dict[tuple, str]):
    """Answers by (options, prompt, pictures), kept in a file, if there is one, from one start to the next."""

    def __init__(self, file: Path | None, weights: str, rank: int) -> None:
        """
        Args:
            file: what the files of all ranks are named after.
            weights: of the model; answers of another one in the file are not taken.
        """
        super().__init__()
        self.weights, self.known = weights, {}
        self.file = file.with_name(f"{file.name}.{rank}") if file else None
        for old in sorted(file.parent.glob(f"{file.name}.*")) if file else ():
            for line in old.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # half a line, left by a kill
                    self.known |= json.loads(line)

    def __contains__(self, key: object) -> bool:
        digest = self._digest(key)
        if not super().__contains__(key) and digest in self.known:
            self[key] = self.known[digest]
        return super().__contains__(key)

    def add(self, answers: dict[tuple, str]) -> None:
        """Take answers in, and write them down."""
        self.update(answers)
        if self.file and answers:
            lines = {self._digest(key): text for key, text in answers.items()}
            with open(self.file, "a", encoding="utf-8") as f:
                f.write("\n" + json.dumps(lines, ensure_ascii=False))

    def _digest(self, key: Any) -> str:
        return hashlib.sha256(repr((self.weights, key)).encode()).hexdigest()


def _in_rgb(value: Any) -> Any:
    """A row of a task with every image in it by the rules of `diffclip.pictures`."""
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, dict):
        return {key: _in_rgb(inner) for key, inner in value.items()}
    return [_in_rgb(inner) for inner in value] if isinstance(value, list) else value


def _samples(options: dict) -> bool:
    return bool(options.get("do_sample") or (options.get("temperature") or 0) > 0)
