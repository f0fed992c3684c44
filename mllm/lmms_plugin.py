"""Our models for lmms-eval: `lmms-eval --model diffclip_llava --model_args pretrained=RUN --tasks pope`.

Prompts are built from the conversation template that the model was trained with, never from a chat template that
lmms-eval or the tokenizer might bring along.
"""

import glob
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import EpsImagePlugin, Image
from tqdm import tqdm

from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl, read_jsonl
from diffclip.base.images import as_decoder, to_rgb
from diffclip.base.orphans import end_with_parents
from mllm.conversation import IGNORE, IMAGE, check_image_count, question_turn
from mllm.data.examples import collate
from mllm.model import SAMPLING, generation_options, load

PROGRESS = "diffclip_llava"  # what the progress bar begins with
AUTO = {"cuda": 64, "cpu": 8}  # questions at a time that --batch_size auto begins with
# generation options of tasks and of --gen_kwargs that are passed on; until is ours to heed
OPTIONS = {
    *("max_new_tokens", "max_gen_toks", "min_new_tokens", "do_sample", *SAMPLING, "num_beams", "early_stopping"),
    *("length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
}
end_with_parents()  # an evaluation that is killed leaves no lmms-eval behind
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
            batch_size: questions at a time, per process; "auto" begins with many, 8 on a CPU and 64 elsewhere, and
                halves them where memory runs out.
            device: e.g. "cuda:0"; by default the process's own.
            dtype: "bfloat16", "float32", ...; by default as stored.
            max_batch_size: the most that "auto" begins with.
            answers: a file that generated answers are added to as they come (with the rank behind its name); the same
                command, started again after a kill, takes them from there.
        """
        super().__init__()
        self.auto = str(batch_size).split(":")[0] == "auto"  # lmms-eval knows auto:N too
        if not self.auto and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            raise InputError(f"batch_size is {batch_size}: give a number of questions, or auto")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = pick_device(device) if device and self._world_size == 1 else self.accelerator.device
        self.vlm = load(pretrained, dtype, self.device)
        most = int(max_batch_size or AUTO.get(self.device.type, AUTO["cuda"]))
        self.batch_size = most if self.auto else int(batch_size)
        self.answers = Path(answers) if answers else None
        self.identity = self.vlm.identity() if answers else ""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; greedy unless the task asks to sample.

        A question asked twice about the same image, as POPE's three splits do, is answered once.
        """
        unknown = sorted({name for request in requests for name in request.args[1]} - OPTIONS - {"until"})
        if unknown and self.rank == 0:
            logger.warning(f"diffclip_llava answers without the generation options {', '.join(unknown)}: unknown to it")
        answers = AnswerCache(self.answers, self.identity, self._rank)  # by options, prompt and images
        keys: list[tuple] = [()] * len(requests)
        waiting: dict[tuple, list[Image.Image]] = {}
        for i in self._in_order(requests):
            context, options, doc_to_visual, doc_id, task, split = requests[i].args
            images = self._images(doc_to_visual, doc_id, task, split)
            seen = tuple(hashlib.sha256(image.tobytes()).digest() for image in images)
            (prompt,) = self.vlm.prompts([[question_turn(context, len(images))]])
            name = f"task {task}, question {doc_id} of {split}: "
            check_image_count(prompt.count(IMAGE), len(images), self.vlm.template, name)
            keys[i] = (json.dumps(options, sort_keys=True), prompt, seen)
            if _task_options(options)["do_sample"]:
                keys[i] += (i,)
            if keys[i] in answers or keys[i] in waiting:
                continue
            if waiting and (len(waiting) >= self.batch_size or next(iter(waiting))[0] != keys[i][0]):
                answers.add(dict(zip(waiting, self._in_memory(self._answer, list(waiting.items())))))
                waiting = {}
            waiting[keys[i]] = images
        answers.add(dict(zip(waiting, self._in_memory(self._answer, list(waiting.items())))))
        return [answers[key] for key in keys]

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, without the end token, and whether greedy decoding writes it."""
        results: dict[int, tuple[float, bool]] = {}
        order = self._in_order(requests)
        while some := list(islice(order, self.batch_size)):
            results |= zip(some, self._in_memory(self._likelihoods, [requests[i] for i in some]))
        return [results[i] for i in range(len(requests))]

    def _likelihoods(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """`loglikelihood` of one batch."""
        examples = []
        for request in requests:
            context, target, doc_to_visual, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            images = self._images(doc_to_visual, doc_id, task, split)
            turns = [question_turn(context, len(images)), {"from": "gpt", "value": answer.strip()}]
            encoded = self.vlm.encode(turns, len(images), name=f"task {task}, question {doc_id} of {split}: ")
            example = {name: torch.tensor(ids) for name, ids in encoded.items()}
            end = example["labels"].eq(self.vlm.tokenizer.eos_token_id).nonzero()[-1]
            example["labels"][end:] = IGNORE  # the end token is no part of the continuation, nor what a template adds
            if images:
                example["pixel_values"] = self.vlm.pixels(images).to(self.vlm.model.dtype)
            examples.append(example)
        batch = collate(self.vlm.processor)(examples)
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")[:, 1:]  # (batch, tokens - 1)
        logits = self.vlm.model(**inputs).logits[:, :-1].float()  # (batch, tokens - 1, vocabulary)
        supervised = labels != IGNORE
        chosen = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        greedy = ((logits.argmax(-1) == labels) | ~supervised).all(1)
        return list(zip((chosen * supervised).sum(1).tolist(), greedy.tolist()))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise RuntimeError("diffclip_llava answers tasks of one round only")

    def _in_order(self, requests: list[Instance]) -> Iterator[int]:
        """Indices of the requests, those with equal options together and the longest first, under a bar."""
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        yield from tqdm(order, desc=PROGRESS, unit="question", disable=self.rank != 0)

    def _images(
        self, doc_to_visual: Callable[[dict], list | None], doc_id: int, task: str, split: str
    ) -> list[Image.Image]:
        # before the task's own convert("RGB"), which would lay transparency over black and cut 16 bits at 255
        with as_decoder():  # for tasks that open files
            images = list(doc_to_visual(_in_rgb(self.task_dict[task][split][doc_id])) or [])
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"task {task} shows something that is no image; diffclip_llava sees images only")
        return [to_rgb(image) for image in images]

    def _in_memory(self, compute: Callable[[Sequence], list], batch: Sequence) -> list:
        """`compute(batch)`; under --batch_size auto in halves where memory runs out, as all later batches then."""
        try:
            return compute(batch)
        except torch.OutOfMemoryError:
            if not self.auto or len(batch) == 1:
                raise
        self.batch_size = (len(batch) + 1) // 2
        logger.warning(f"diffclip_llava: out of memory; from now on {self.batch_size} questions at a time")
        torch.cuda.empty_cache()
        halves = batch[: self.batch_size], batch[self.batch_size :]
        return [result for half in halves for result in self._in_memory(compute, half)]

    def _answer(self, batch: Sequence[tuple[tuple, list[Image.Image]]]) -> list[str]:
        """Answers to one batch of (options, prompt, ...) keys with their images, all of the same options."""
        if not batch:
            return []
        options = json.loads(batch[0][0][0])
        prompts, images = [key[1] for key, _ in batch], [images for _, images in batch]
        texts = self.vlm.generate(prompts, images, **_task_options(options))
        stops = options.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return [text.strip() for text in texts]


class AnswerCache(dict[tuple, str]):
    """Answers by (options, prompt, images), kept in a file, if there is one, from one start to the next."""

    def __init__(self, file: Path | None, model: str, rank: int) -> None:
        """The files of all ranks are named after `file`; answers of another model (by `identity`) are not taken."""
        super().__init__()
        self.model = model
        self.known: dict[str, str] = {}
        self.file = file.with_name(f"{file.name}.{rank}") if file else None
        for old in sorted(file.parent.glob(glob.escape(file.name) + ".*")) if file else ():
            for _, answers in read_jsonl(old, damaged="skip") if old.is_file() else ():  # half a line is left by a kill
                self.known |= answers if isinstance(answers, dict) else {}

    def __contains__(self, key: object) -> bool:
        digest = self._digest(key)
        if isinstance(key, tuple) and digest in self.known:
            self.setdefault(key, self.known[digest])
        return super().__contains__(key)

    def add(self, answers: dict[tuple, str]) -> None:
        """Take answers in, and write them down."""
        self.update(answers)
        if self.file and answers:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.file, [{self._digest(key): text for key, text in answers.items()}])

    def _digest(self, key: Any) -> str:
        return hashlib.sha256(repr((self.model, key)).encode()).hexdigest()


def _task_options(options: dict) -> dict[str, Any]:
    """What `generate` is told: a task's options as `mllm.model` reads them, 1,024 new tokens by default."""
    known = {name: value for name, value in options.items() if name in OPTIONS}
    given = {"max_new_tokens", "max_gen_toks"} & {name for name, value in known.items() if value is not None}
    return generation_options(known if given else {**known, "max_new_tokens": 1024})


def _in_rgb(value: Any) -> Any:
    """A row of a task with every image in it by the rules of `diffclip.base.images`."""
    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, dict):
        return {key: _in_rgb(inner) for key, inner in value.items()}
    return [_in_rgb(inner) for inner in value] if isinstance(value, list) else value
