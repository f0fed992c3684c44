"""Chat: streamed pieces are the generated answer, batches equal single questions, files go on where they were."""

import json
import subprocess
import sys

import pytest
import torch
from launch import ROOT, environment, run

from diffclip.errors import InputError
from mllm import chat
from mllm.conversation import prompt
from mllm.model import save

QUESTIONS = ["Is there a red square?", "Is there a small blue circle left of the green star in the image?", "USER"]


def plain_generate(model, processor, question, picture, **options):
    """transformers' own generate on one example, without any of mllm.chat."""
    text = prompt([{"from": "human", "value": f"<image>\n{question}"}], "vicuna", processor.tokenizer.eos_token)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_stream_and_batch_give_the_answers_of_generate(assembled, picture):
    model, processor = assembled
    pictures = [picture(n) for n in range(3)]
    wanted = [plain_generate(model, processor, q, p, max_new_tokens=12) for q, p in zip(QUESTIONS, pictures)]
    assert len(set(wanted)) > 1 and all(wanted)
    turns = [[chat.question_turn(question, 1)] for question in QUESTIONS]
    streamed = [list(chat.stream(model, processor, t, [p], max_new_tokens=12)) for t, p in zip(turns, pictures)]
    assert ["".join(pieces).strip() for pieces in streamed] == wanted
    assert max(map(len, streamed)) > 1  # in pieces, not at the end
    assert chat.answer(model, processor, turns, pictures, max_new_tokens=12) == wanted  # padded on the left


def test_cache_and_bfloat16_generate(assembled, picture):
    model, processor = assembled
    turns = [[chat.question_turn(QUESTIONS[1], 1)]]
    cached = chat.answer(model, processor, turns, [picture(1)], max_new_tokens=12)
    assert chat.answer(model, processor, turns, [picture(1)], max_new_tokens=12, use_cache=False) == cached
    assert isinstance(chat.answer(model.to(torch.bfloat16), processor, turns, [picture(1)], max_new_tokens=4)[0], str)


def test_pictures_and_placeholders_must_agree(assembled, picture):
    with pytest.raises(InputError, match="shows 1 pictures, but 0 are given"):
        chat.answer(*assembled, [[chat.question_turn("x", 1)]], [])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tower_dir, language_dir, picture):
    from mllm.assemble import assemble

    folder = tmp_path_factory.mktemp("chat")
    save(*assemble(tower_dir, language_dir, seed=3), folder / "run")
    for n in range(5):
        picture(n).save(folder / f"{n}.png")
    rows = [{"image": f"{n}.png", "question": QUESTIONS[n % 3], "id": n} for n in range(5)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_file_of_questions_goes_on_after_a_kill(saved, tmp_path):
    options = [f"--image_root={saved}", "--batch_size=2", "--max_new_tokens=6"]
    arguments = ["mllm.chat", str(saved / "run"), f"--batch={saved / 'questions.jsonl'}", *options]
    run(*arguments, f"--out={tmp_path / 'whole.jsonl'}")
    whole = (tmp_path / "whole.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == list(range(5)) and all(isinstance(row["answer"], str) for row in rows)
    lines = whole.splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    run(*arguments, f"--out={tmp_path / 'cut.jsonl'}")
    assert (tmp_path / "cut.jsonl").read_text() == whole


def test_a_conversation_on_the_console(saved):
    command = [
        sys.executable,
        "-m",
        "mllm.chat",
        str(saved / "run"),
        f"--image={saved / '1.png'}",
        "--max_new_tokens=5",
    ]
    told = subprocess.run(
        command, input=f"{QUESTIONS[0]}\nAnd now?\n\n", capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("> ") == 3 and len(told.stdout) > 10


def test_what_is_wrong_is_said_in_one_sentence(saved, tmp_path):
    for arguments, words in [
        ([str(saved / "run"), "--image=absent.png", "Is it?"], "absent.png cannot be read as an image"),
        ([str(saved / "run"), "--batch=x.jsonl"], "--batch and --out go together"),
        ([str(tmp_path), "Is it?"], "no model that"),
    ]:
        ended = run("mllm.chat", *arguments, check=False)
        assert ended.returncode == 2 and words in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def test_closing_a_stream_ends_the_generation(assembled, picture):
    model, processor = assembled
    passes = []
    model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    pieces = chat.stream(model, processor, [chat.question_turn(QUESTIONS[0], 1)], [picture(0)], max_new_tokens=400)
    next(pieces)
    pieces.close()
    done = len(passes)
    assert done < 400
    assert chat.answer(model, processor, [[chat.question_turn(QUESTIONS[0], 1)]], [picture(0)], max_new_tokens=1)
    assert len(passes) == done + 1  # nothing went on behind
