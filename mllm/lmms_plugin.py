"""Our models for lmms-eval: `lmms-eval --model diffclip_llava --model_args pretrained=RUN --tasks pope`.

Prompts are built from the conversation template that the model was trained with, never from a chat template that
lmms-eval or the tokenizer might bring along.
"""

import glob
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, dispatch_model, infer_auto_device_map
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import EpsImagePlugin, Image
from tqdm import tqdm

from diffclip.base.devices import pick_device
from diffclip.base.errors import InputError
from diffclip.base.files import append_jsonl, read_jsonl
from diffclip.base.images import DECODING, as_decoder, rgb_by, to_rgb
from diffclip.base.orphans import end_with_parents
from mllm.conversation import IGNORE, IMAGE, check_image_count, question_turn
from mllm.data.examples import collate
from mllm.lmms_repairs import ends_all, keep_likelihoods, parse_in_c
from mllm.model import SAMPLING, generation_options, load
from mllm.pope.scores import CONTROLS, grey_image

PROGRESS = "diffclip_llava"  # what the progress bar begins with
AUTO = {"cuda": 64, "cpu": 8}  # questions at a time that --batch_size auto begins with
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # values of device_map that are no device
MOST_ROUNDS = 100  # of a conversation that a task leads
# generation options of tasks and of --gen_kwargs that are passed on; until is ours to heed
OPTIONS = {
    *("max_new_tokens", "max_gen_toks", "min_new_tokens", "do_sample", *SAMPLING, "num_beams", "early_stopping"),
    *("length_penalty", "repetition_penalty", "no_repeat_ngram_size"),
}
end_with_parents()  # an evaluation that is killed leaves no lmms-eval behind
parse_in_c()  # lmms-eval asks for our model before it reads its tasks
EpsImagePlugin.gs_binary = False  # `datasets` decodes the tasks' images: none of them is a program for Ghostscript


def manifest() -> ModelManifest:
    """The entry point through which lmms-eval finds the model."""
    return ModelManifest(model_id="diffclip_llava", simple_class_path="mllm.lmms_plugin.DiffCLIPLlavaForEvaluation")


class Question(NamedTuple):
    """What a task asks: a text about images, by the options of generation or with the answer that is to be judged."""

    text: str
    told: Any  # options of generation, or the answer
    images: Callable[[], list[Image.Image]]
    name: str  # begins messages

    @property
    def options(self) -> str:
        """By which questions of one batch are alike."""
        return json.dumps(self.told, sort_keys=True) if isinstance(self.told, dict) else ""


class DiffCLIPLlavaForEvaluation(lmms):
    """A run of stages.instruct (or align), answering in batches on one or several processes."""

    is_simple = True
    shown: str | None = None
    rgb: Callable[[Image.Image], Image.Image] = staticmethod(to_rgb)

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        max_batch_size: int | str | None = None,
        answers: str | None = None,
        asked: str | None = None,
        shown: str | None = None,
    ) -> None:
        """
        Args:
            pretrained: a run directory or Hub id.
            batch_size: questions at a time, per process; "auto" begins with many, 8 on a CPU and 64 elsewhere, and
                halves them where memory runs out.
            device: e.g. "cuda:0"; by default the process's own.
            dtype: "bfloat16", "float32", ...; by default ("auto") as stored.
            device_map: a device, or one of `SPREAD`: the layers of a single process over all its GPUs.
            max_batch_size: the most that "auto" begins with.
            answers: a file that generated answers are added to as they come (with the rank behind its name); the same
                command, started again after a kill, takes them from there.
            asked: a file (with the rank behind its name) that gets a row {task, doc_id, question, images} for each
                question, `images` being digests: which questions share one.
            shown: one of POPE's controls, `mllm.pope.scores.CONTROLS`: "shuffled" shows the images of another question
                of the task, "grey" grey ones, "no_image" none.
        """
        super().__init__()
        keep_likelihoods()
        self.auto = str(batch_size).split(":")[0] == "auto"  # lmms-eval knows auto:N too
        if not self.auto and (not str(batch_size).isdecimal() or int(batch_size) < 1):
            raise InputError(f"batch_size is {batch_size}: give a number of questions, or auto")
        if shown and shown not in CONTROLS:
            raise InputError(f"shown is {shown}: give one of {', '.join(CONTROLS)}, or leave it out")
        if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise InputError(f"dtype is {dtype}: give bfloat16, float16, float32, or auto for that of the weights")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        device = device_map if device_map and device_map not in SPREAD else device
        self.device = pick_device(device) if device and alone else self.accelerator.device
        self.vlm = load(pretrained, None if dtype == "auto" else dtype, self.device)
        if device_map in SPREAD and alone and torch.cuda.device_count() > 1:
            whole = self.vlm.model._no_split_modules or []
            places = infer_auto_device_map(self.vlm.model, no_split_module_classes=list(whole))
            dispatch_model(self.vlm.model, places)
        self.rgb = rgb_by(getattr(self.vlm.processor.image_processor, "decoding", DECODING))  # as in its training
        most = int(max_batch_size or AUTO.get(self.device.type, AUTO["cuda"]))
        self.batch_size = most if self.auto else int(batch_size)
        self.answers = Path(answers) if answers else None
        self.asked = Path(f"{asked}.{self._rank}") if asked else None
        self.shown = shown
        self.identity = self.vlm.identity() if answers else ""

    @ends_all
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; greedy unless the task asks to sample.

        A question asked twice about the same image, as POPE's three splits do, is answered once.
        """
        questions = []
        for request in requests:
            context, options, doc_to_visual, *place = request.args
            questions.append(self._question(context, options, doc_to_visual, *place))
        self._note(requests, questions)
        return self._answers_to(questions)

    @ends_all
    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """What each request's task makes of the answers to its questions, which it asks one after the other.

        As lmms-eval has it, `doc_to_text` is told the answers so far and gives (images, question, whether that was
        all, answers to keep, something to be told again).
        """
        asked = []
        for request in requests:
            context, options, doc_to_visual, _, *place = request.args
            asked.append(self._question(context, options, doc_to_visual, *place))
        self._note(requests, asked)
        given: list[list[str]] = [[] for _ in requests]
        kept: list[Any] = [None] * len(requests)
        going = list(range(len(requests)))
        for round_index in range(1, MOST_ROUNDS + 1):
            for i, answer in zip(going, self._answers_to(asked)):
                given[i].append(answer)
            asked, still = [], []
            for i in going:
                _, options, _, doc_to_text, *place = requests[i].args
                told = {"previous_output": given[i], "round_idx": round_index, "previous_round_info": kept[i]}
                images, text, ended, outputs, kept[i] = doc_to_text(self._document(*place), **told)
                given[i] = list(outputs)
                if not ended:
                    still.append(i)
                    asked.append(self._question(text, options, lambda _, images=images: images, *place))
            if not still:
                return given
            going = still
        raise InputError(f"task {requests[going[0]].args[5]} asks more than {MOST_ROUNDS} times about one document")

    @ends_all
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, without the end token, and whether greedy decoding writes it.

        lmms-eval takes the smallest value for the choice of a task with output_type multiple_choice, since its own
        models return losses: the continuations of a document that has several are given with the sign turned.
        """
        questions, of_document = [], defaultdict(set)
        for request in requests:
            # a bare pair is a choice by itself, of tasks that weigh choices by how likely they are anyway
            context, target, *rest = request.args
            doc_to_visual, *place = rest or (lambda doc: [], None, "", "")
            answer = target if isinstance(target, str) else target(self._document(*place))
            questions.append(self._question(context, answer, doc_to_visual, *place))
            if rest:
                of_document[tuple(place)].add((context, answer))
        self._note(requests, questions)
        results: dict[int, tuple[float, bool]] = {}
        order = self._in_order(questions)
        while some := list(islice(order, self.batch_size)):
            results |= zip(some, self._in_memory(self._likelihoods, [questions[i] for i in some]))
        signs = [-1 if not request.args[2:] or len(of_document[request.args[3:]]) > 1 else 1 for request in requests]
        return [(sign * results[i][0], results[i][1]) for i, sign in enumerate(signs)]

    def _question(self, text: str, told: Any, doc_to_visual: Callable, doc_id: int, task: str, split: str) -> Question:
        def images() -> list[Image.Image]:
            return self._images(doc_to_visual, doc_id, task, split)

        text = text.replace(IMAGE, "").strip() if self.shown == "no_image" else text
        return Question(text, told, images, f"task {task}, question {doc_id} of {split}: ")

    def _document(self, doc_id: int, task: str, split: str) -> Any:
        try:
            return _in_rgb(self.task_dict[task][split][doc_id], self.rgb)
        except OSError as error:  # of Pillow, which `datasets` decodes with
            raise InputError(f"task {task}, question {doc_id} of {split}: its image cannot be read ({error})") from None

    def _note(self, requests: list[Instance], questions: list[Question]) -> None:
        """Write to `asked` what was asked about which images."""
        if self.asked is None:
            return
        rows = []
        for request, question in zip(requests, questions):
            if len(request.args) > 2:
                doc_id, task, _ = request.args[-3:]
                images = [_digest(image).hex()[:16] for image in question.images()]
                rows.append({"task": task, "doc_id": doc_id, "question": question.text, "images": images})
        self.asked.parent.mkdir(parents=True, exist_ok=True)
        append_jsonl(self.asked, rows)

    def _answers_to(self, questions: Sequence[Question]) -> list[str]:
        """Answers in the order of the questions, each written down as it comes; those with equal keys are one."""
        unknown = sorted({name for question in questions for name in question.told} - OPTIONS - {"until"})
        if unknown and self.rank == 0:
            logger.warning(f"diffclip_llava answers without the generation options {', '.join(unknown)}: unknown to it")
        answers = AnswerCache(self.answers, self.identity, self._rank)  # by options, prompt and images
        keys: list[tuple] = [()] * len(questions)
        waiting: dict[tuple, list[Image.Image]] = {}
        for i in self._in_order(questions):
            question, images = questions[i], questions[i].images()
            prompt = self._prompt(question, len(images))
            keys[i] = (question.options, prompt, tuple(map(_digest, images)))
            if _task_options(question.told)["do_sample"]:
                keys[i] += (i,)
            if keys[i] in answers or keys[i] in waiting:
                continue
            if waiting and (len(waiting) >= self.batch_size or next(iter(waiting))[0] != keys[i][0]):
                answers.add(dict(zip(waiting, self._in_memory(self._answer, list(waiting.items())))))
                waiting = {}
            waiting[keys[i]] = images
        answers.add(dict(zip(waiting, self._in_memory(self._answer, list(waiting.items())))))
        return [answers[key] for key in keys]

    def _prompt(self, question: Question, images: int) -> str:
        """A question as the template writes it, with a placeholder for each of its images."""
        (prompt,) = self.vlm.prompts([[question_turn(question.text, images)]])
        if self._all_in_front(question, images):
            prompt = prompt.replace(IMAGE, "\n".join([IMAGE] * images))
        check_image_count(prompt.count(IMAGE), images, self.vlm.template, question.name)
        return prompt

    def _encode(self, question: Question, images: int) -> dict[str, list[int]]:
        """Token ids of a question and its answer, and labels, as `VisionLanguageModel.encode` gives them."""
        turns = [question_turn(question.text, images), {"from": "gpt", "value": question.told.strip()}]
        if not self._all_in_front(question, images):
            return self.vlm.encode(turns, images, name=question.name)
        encoded = self.vlm.encode(turns, 1, name=question.name)
        config = self.vlm.model.config
        line = self.vlm.tokenizer("\n", add_special_tokens=False)["input_ids"]
        more = [*[config.image_token_id] * config.image_seq_length, *line] * (images - 1)
        place = encoded["input_ids"].index(config.image_token_id)
        encoded["input_ids"][place:place] = more
        encoded["labels"][place:place] = [IGNORE] * len(more)
        return encoded

    def _all_in_front(self, question: Question, images: int) -> bool:
        """Whether several images stand before the question, since vicuna has a place for one, and it is there."""
        return self.vlm.template == "vicuna" and images > 1 and question.text.count(IMAGE) in (0, images)

    @torch.no_grad()
    def _likelihoods(self, questions: Sequence[Question]) -> list[tuple[float, bool]]:
        """`loglikelihood` of one batch."""
        examples = []
        for question in questions:
            images = question.images()
            encoded = self._encode(question, len(images))
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

    def _in_order(self, questions: Sequence[Question]) -> Iterator[int]:
        """Indices of the questions, those with equal options together and the longest first, under a bar."""
        order = sorted(range(len(questions)), key=lambda i: (questions[i].options, -len(questions[i].text)))
        yield from tqdm(order, desc=PROGRESS, unit="question", disable=self.rank != 0)

    def _images(
        self, doc_to_visual: Callable[[Any], list | None], doc_id: int, task: str, split: str
    ) -> list[Image.Image]:
        """What is shown with a question: its images or, in a control, others in their places."""
        images = self._own_images(doc_to_visual, doc_id, task, split)
        if not images or self.shown in (None, "no_image"):
            return [] if self.shown else images
        if self.shown == "grey":
            return [grey_image() for _ in images]
        count = len(self.task_dict[task][split])
        others = random.Random(f"{task} {doc_id}").sample(range(count), count)
        for other in others:
            try:
                found = self._own_images(doc_to_visual, other, task, split)
            except (KeyError, IndexError, TypeError):  # of a round that the other document does not have
                continue
            if len(found) == len(images) and not set(map(_digest, found)) & set(map(_digest, images)):
                return found
        raise InputError(f"task {task}, question {doc_id} of {split}: no other question shows other images")

    def _own_images(
        self, doc_to_visual: Callable[[Any], list | None], doc_id: int, task: str, split: str
    ) -> list[Image.Image]:
        # before the task's own convert("RGB"), which would lay transparency over black and cut 16 bits at 255
        with as_decoder(self.rgb):  # for tasks that open files
            images = list(doc_to_visual(self._document(doc_id, task, split) if task else None) or [])
        if not all(isinstance(image, Image.Image) for image in images):
            raise InputError(f"task {task} shows something that is no image; diffclip_llava sees images only")
        return [self.rgb(image) for image in images]

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


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def _in_rgb(value: Any, rgb: Callable[[Image.Image], Image.Image]) -> Any:
    """A row of a task with every image in it by rules of `diffclip.base.images`."""
    if isinstance(value, Image.Image):
        return rgb(value)
    if isinstance(value, dict):
        return {key: _in_rgb(inner, rgb) for key, inner in value.items()}
    return [_in_rgb(inner, rgb) for inner in value] if isinstance(value, list) else value
