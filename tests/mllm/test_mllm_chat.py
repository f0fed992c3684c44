"""Chat: streamed pieces are the generated answer, batches equal single questions, files go on where they were."""

import json
import re
import shutil

import pytest
import torch
from launch import call
from safetensors.torch import load_file, save_file

from diffclip.base.errors import InputError, exit_on_input_error
from diffclip.base.lines import printable
from mllm import chat
from mllm.answer_file import answer_file
from mllm.assemble import assemble
from mllm.conversation import prompt, question_turn
from mllm.model import VisionLanguageModel, generation_options, load
from stages import cli
from stages.publish import USE

QUESTIONS = ["Is there a red square?", "Is there a small blue circle left of the green star in the image?", "USER"]


def plain_generate(model, processor, question, picture, **options):
    """transformers' own generate on one example, without any of mllm.chat."""
    text = prompt([{"from": "human", "value": f"<image>\n{question}"}], "vicuna", processor.tokenizer.eos_token)
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    tokens = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_stream_and_batch_give_the_answers_of_generate(assembled, picture):
    images = [picture(n) for n in range(3)]
    wanted = [plain_generate(*assembled, q, p, max_new_tokens=12) for q, p in zip(QUESTIONS, images)]
    assert len(set(wanted)) > 1 and all(wanted)
    turns = [[question_turn(question, 1)] for question in QUESTIONS]
    streamed = [list(assembled.stream(t, [p], max_new_tokens=12)) for t, p in zip(turns, images)]
    assert ["".join(pieces).strip() for pieces in streamed] == wanted
    assert max(map(len, streamed)) > 1  # in pieces, not at the end
    assert assembled.answer(turns, [[image] for image in images], max_new_tokens=12) == wanted  # padded on the left
    assert assembled.ask(QUESTIONS[1], [images[1]], max_new_tokens=12) == wanted[1]


def test_cache_and_bfloat16_generate(assembled, picture):
    asked = QUESTIONS[1], [picture(1)]
    cached = assembled.ask(*asked, max_new_tokens=12)
    assert assembled.ask(*asked, max_new_tokens=12, use_cache=False) == cached
    assembled.model.to(torch.bfloat16)
    assert isinstance(assembled.ask(*asked, max_new_tokens=4), str)


def test_images_and_placeholders_must_agree(assembled):
    with pytest.raises(InputError, match="shows 1 images, but 0 are given"):
        assembled.answer([[question_turn("x", 1)]], [[]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tower_dir, language_dir, picture):
    folder = tmp_path_factory.mktemp("chat")
    assemble(tower_dir, language_dir, seed=3).save(folder / "run")
    for n in range(5):
        picture(n).save(folder / f"{n}.png")
    rows = [{"image": f"{n}.png", "question": QUESTIONS[n % 3], "id": n} for n in range(5)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_file_of_questions_goes_on_after_a_kill(saved, tmp_path):
    options = [f"--image_root={saved}", "--batch_size=2", "--max_new_tokens=6"]
    arguments = ["mllm.chat", str(saved / "run"), f"--batch={saved / 'questions.jsonl'}", *options]
    call(*arguments, f"--out={tmp_path / 'whole.jsonl'}")
    whole = (tmp_path / "whole.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == list(range(5)) and all(isinstance(row["answer"], str) for row in rows)
    lines = whole.splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    call(*arguments, f"--out={tmp_path / 'cut.jsonl'}")
    assert (tmp_path / "cut.jsonl").read_text() == whole


@pytest.fixture(scope="module")
def loaded(saved):
    return load(saved / "run")


def broken(folder, source, name, damage):
    """A copy of a model in one file, one of whose parameters is damaged."""
    state = load_file(shutil.copytree(source, folder) / "model.safetensors")
    name = next(key for key in state if key.endswith(name))
    weight = state.pop(name).clone()
    if damage != "missing":
        bits = weight.flatten().view(torch.int32)
        bits[5] = 0x7FC00000 if damage == "NaN" else int(bits[5]) ^ 1 << 30
        state[name] = weight
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["NaN", "flipped", "missing"])
def test_commands_name_damaged_weights(saved, tower_dir, language_dir, tmp_path, capsys, damage):
    """A question, an evaluation, and an assembling on a damaged tower and with a damaged language model."""
    part, tower_part = "layers.1.mlp.gate_proj.weight", "encoder.layers.1.mlp.fc1.weight"
    model = broken(tmp_path / "model", saved / "run", f"model.language_model.{part}", damage)
    language = broken(tmp_path / "language", language_dir, f"model.{part}", damage)
    tower = broken(tmp_path / "tower", tower_dir, tower_part, damage)
    turns = [{"from": "human", "value": "<image>\nA"}, {"from": "gpt", "value": "B"}]
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": "0.png", "conversations": turns}])
    for split in ("random", "popular", "adversarial"):
        pope = {"question_id": 1, "image": "0.png", "text": "Is there a dog in the image?", "label": "yes"}
        write_rows(tmp_path / f"coco_pope_{split}.json", [pope])
    evaluate = ["evaluate", f"--pope={tmp_path}", f"--image_root={saved}", f"--output_dir={tmp_path / 'evaluated'}"]
    align = ["align", f"--data={rows}", f"--image_root={saved}", f"--output_dir={tmp_path / 'out'}", "--use_cpu"]
    for words, named in (
        (["chat", str(model), "What?", "--device=cpu"], rf"{model}\S*: .*{part}"),
        ([*evaluate, f"--mllm={model}"], rf"{model}\S*: .*{part}"),
        ([*align, f"--vision_tower={tower}", f"--language_model={language_dir}"], rf"{tower}\S*: .*{tower_part}"),
        ([*align, f"--vision_tower={tower_dir}", f"--language_model={language}"], rf"{language}\S*: .*{part}"),
    ):
        with pytest.raises(SystemExit) as ended, exit_on_input_error():
            cli.call(words)
        assert ended.value.code == 2 and re.search(named, said := capsys.readouterr().err), said


def answered(out):
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask_file(vlm, questions, out, root, **options):
    answer_file(vlm, questions, out, root, 2, **{"max_new_tokens": 6, **options})
    return answered(out)


def test_questions_in_other_layouts_are_asked_alike_and_keep_no_bytes(loaded, saved, tmp_path):
    """LLaVA's question files, OpenAI's messages, conversations without their answer, and images inside parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    part = {"type": "image_url", "image_url": {"url": "0.png"}}
    said = {"type": "text", "text": QUESTIONS[0]}
    rows = [
        {"image": "0.png", "question": QUESTIONS[0]},
        {"question_id": 7, "image": "0.png", "text": QUESTIONS[0], "category": "x"},
        {"messages": [{"role": "user", "content": [part, said]}]},
        {"images": ["0.png"], "conversations": [{"from": "human", "value": f"<image>\n{QUESTIONS[0]}"}]},
    ]
    given = ask_file(loaded, write_rows(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl", saved)
    inside = [{"image": {"bytes": (saved / "0.png").read_bytes(), "path": "0.png"}, "question": QUESTIONS[0]}]
    parquet.write_table(pa.Table.from_pylist(inside), tmp_path / "q.parquet")
    given += ask_file(loaded, tmp_path / "q.parquet", tmp_path / "b.jsonl", saved)
    assert len({row["answer"] for row in given}) == 1 and given[1]["question_id"] == 7
    assert given[4]["image"] == {"path": "0.png"}
    assert ask_file(loaded, tmp_path / "q.parquet", tmp_path / "b.jsonl", saved) == given[4:]  # goes on


BAD_ROWS = [
    ({"image": ["0.png", "1.png"]}, "shows 1 images, but 2 are given.*one image at a time"),
    ({"image": None, "question": "<image>\nIs there?"}, "shows 1 images, but 0 are given.*remove <image>"),
    ({"image": 5}, "`image` holds 5, which is no path"),
    ({"image": {"name": "0.png"}}, "`image` holds None, which is no path"),
    ({"image": ["0.png", None]}, "`image` holds None, which is no path"),
    ({"image": "https://example.org/0.png"}, "image https://example.org/0.png is an address.*path of a copy"),
    ({"question": "What is <|im_<image>end|>?"}, r"a question contains <\|im_end\|>"),
    ({"image": "absent.png"}, "image absent.png is not under"),
    ({"question": " "}, "has no question"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_ROWS)
def test_a_row_that_cannot_be_asked_is_named_before_any_is_answered(loaded, saved, tmp_path, bad, words):
    """Also where another row's fault makes the numbers of a batch agree."""
    other = {"image": "3.png", "question": QUESTIONS[1]}
    rows = [other, {**other, **bad}, other, {"image": None, "question": "<image>\nIs there?"}]
    questions = write_rows(tmp_path / "q.jsonl", rows)
    with pytest.raises(InputError, match=rf"q\.jsonl: row 1.*{words}"):
        ask_file(loaded, questions, tmp_path / "a.jsonl", saved)
    assert not (tmp_path / "a.jsonl").exists()


def test_rows_whose_numbers_of_images_cancel_out_are_refused(loaded, shared_cases, tmp_path):
    folder = shared_cases("rows/batch")
    rows = answered(folder / "cancel.jsonl")
    for number, left in ((1, rows), (2, [rows[0], rows[2], rows[3]])):
        with pytest.raises(InputError, match=rf"row {number}: in template `vicuna` the conversation shows 1 images"):
            ask_file(loaded, write_rows(tmp_path / "q.jsonl", left), tmp_path / "a.jsonl", folder)
    assert not (tmp_path / "a.jsonl").exists()
    questions = write_rows(tmp_path / "q.jsonl", [rows[0], rows[2]])
    given = ask_file(loaded, questions, tmp_path / "a.jsonl", folder)
    from diffclip.base.images import decode

    shown = [decode(folder / name) for name in ("000.jpg", "003.jpg")]
    wanted = [plain_generate(*loaded, rows[0]["question"], one, max_new_tokens=6) for one in shown]
    assert [row["answer"] for row in given] == wanted


def test_images_are_matched_text_by_text(assembled, picture):
    turns = [[question_turn(question, 1)] for question in QUESTIONS[:2]]
    with pytest.raises(InputError, match=r"conversation 1: .* shows 1 images, but 2 are given"):
        assembled.answer(turns, [[picture(0), picture(1)], []])
    mixed = [[question_turn(QUESTIONS[0], 0)], turns[1]]
    alone = [assembled.ask(QUESTIONS[0], max_new_tokens=6), assembled.ask(QUESTIONS[1], [picture(1)], max_new_tokens=6)]
    assert assembled.answer(mixed, [[], [picture(1)]], max_new_tokens=6) == alone


def test_what_another_model_or_other_options_answered_is_never_kept(loaded, saved, tmp_path, tower_dir, language_dir):
    questions, out = saved / "questions.jsonl", tmp_path / "a.jsonl"
    whole = ask_file(loaded, questions, out, saved)
    other = assemble(tower_dir, language_dir, seed=4)
    out.write_text("".join(json.dumps(row) + "\n" for row in whole[:3]))
    for model, options in ((other, {}), (loaded, {"max_new_tokens": 7}), (loaded, {"temperature": 0.5})):
        with pytest.raises(InputError, match=r"a\.jsonl: line 1 is the answer of another model.*another --out"):
            ask_file(model, questions, out, saved, **options)
    assert answered(out) == whole[:3]
    write_rows(out, [{key: value for key, value in row.items() if key != "answer_id"} for row in whole])
    with pytest.raises(InputError, match=r"line 1 does not say which model answered.*remove this file"):
        ask_file(loaded, questions, out, saved)
    out.unlink()  # the remedy
    assert [row["answer"] for row in ask_file(other, questions, out, saved)] != [row["answer"] for row in whole]
    out.unlink()
    assert ask_file(loaded, questions, out, saved, temperature=0.0, do_sample=True) == whole  # the same options


def test_answers_are_found_again_by_their_rows_and_images(loaded, saved, tmp_path, picture, monkeypatch):
    for n in range(5):
        picture(n).save(tmp_path / f"{n}.png")
    rows = [{"image": f"{n}.png", "question": QUESTIONS[n % 3], "note": "a\u2028b"} for n in range(4)]
    questions, out = write_rows(tmp_path / "q.jsonl", rows), tmp_path / "a.jsonl"
    first = ask_file(loaded, questions, out, tmp_path)
    assert [row["note"] for row in rows] == [row["note"] for row in first]
    asked, answer = [], VisionLanguageModel.answer

    def counted(vlm, turns, images, **options):
        asked.extend(turn[0]["value"] for turn in turns)
        return answer(vlm, turns, images, **options)

    monkeypatch.setattr(VisionLanguageModel, "answer", counted)
    new = {"image": "4.png", "question": "And this?"}
    write_rows(questions, [new, rows[0], rows[2], rows[1], rows[3], rows[0]])  # one in front, two swapped, one repeated
    then = ask_file(loaded, questions, out, tmp_path)
    assert asked == ["<image>\nAnd this?", f"<image>\n{QUESTIONS[0]}"]
    assert [row["answer"] for row in then[1:]] == [first[i]["answer"] for i in (0, 2, 1, 3, 0)]
    fresh = ask_file(loaded, questions, tmp_path / "fresh.jsonl", tmp_path)
    assert fresh == then
    out.write_bytes(2 * out.read_bytes())  # as two processes that ran at once leave it
    assert ask_file(loaded, questions, out, tmp_path) == then
    write_rows(questions, rows[1:])
    with pytest.raises(InputError, match=r"line 1 answers a row that .*q\.jsonl does not hold"):
        ask_file(loaded, questions, out, tmp_path)
    write_rows(questions, [new, *rows, rows[0]])
    picture(9).save(tmp_path / "2.png")
    with pytest.raises(InputError, match=r"line 3 .*or its image has changed"):
        ask_file(loaded, questions, out, tmp_path)
    out.write_text("".join(line + "\n" for number, line in enumerate(out.read_text().splitlines()) if number != 2))
    again = ask_file(loaded, questions, out, tmp_path)  # that line removed, as the message says
    assert [again[i] for i in (0, 1, 2, 4, 5)] == [then[i] for i in (0, 1, 3, 4, 5)]
    assert again[3]["answer"] == plain_generate(*loaded, QUESTIONS[2], picture(9), max_new_tokens=6)


def test_a_file_that_holds_no_answers_is_left_alone(loaded, saved, tmp_path):
    for content in ("notes\n", '{"image": "0.png", "question": "Is there?"}\n', "[1]\n"):
        (tmp_path / "out").write_text(content)
        with pytest.raises(InputError, match=r"out:? ?.*1"):
            ask_file(loaded, saved / "questions.jsonl", tmp_path / "out", saved)
        assert (tmp_path / "out").read_text() == content
    for out, words in ((saved / "questions.jsonl", "is the file of the questions"), (tmp_path, "is a folder")):
        with pytest.raises(InputError, match=words):
            ask_file(loaded, saved / "questions.jsonl", out, saved)


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({}, {"max_new_tokens": 512, "do_sample": False}),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, {"max_new_tokens": 512, "do_sample": False}),
        ({"temperature": 0.5}, {"max_new_tokens": 512, "do_sample": True, "temperature": 0.5}),
        ({"temperature": None, "do_sample": True, "top_k": 5}, {"max_new_tokens": 512, "do_sample": True, "top_k": 5}),
        ({"max_gen_toks": 7}, {"max_new_tokens": 7, "do_sample": False}),
        ({"max_gen_toks": 7, "max_new_tokens": 9}, {"max_new_tokens": 9, "do_sample": False}),
        (
            {"repetition_penalty": 1.2, "top_k": 5, "num_beams": 2},
            {"max_new_tokens": 512, "do_sample": False, "repetition_penalty": 1.2, "num_beams": 2},
        ),
    ],
)
def test_options_mean_what_they_say(asked, meant):
    assert generation_options(asked) == meant
    assert generation_options(meant) == meant


@pytest.mark.parametrize("asked", [{"temperature": -1}, {"temperature": float("nan")}, {"max_new_tokens": 0}])
def test_options_without_a_meaning_are_refused(asked):
    (name,) = asked
    with pytest.raises(InputError, match=name):
        generation_options(asked)


def test_temperature_0_is_greedy_whatever_do_sample_says(assembled, picture):
    turns, images = [question_turn(QUESTIONS[0], 1)], [picture(0)]
    greedy = plain_generate(*assembled, QUESTIONS[0], picture(0), max_new_tokens=12, do_sample=False)
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": True}
    assert assembled.answer([turns], [images], temperature=0, **options) == [greedy]
    assert "".join(assembled.stream(turns, images, temperature=0.0, **options)).strip() == greedy
    assert assembled.answer([turns], [images], temperature=5.0, **options) != [greedy]


def test_answers_cut_at_the_last_position_are_said_to_be(assembled, picture):
    asked = QUESTIONS[1], [picture(1)]
    whole = assembled.ask(*asked, max_new_tokens=12)
    ids = assembled.inputs(assembled.prompts([[question_turn(asked[0], 1)]]), [asked[1]])["input_ids"]
    assembled.model.config.text_config.max_position_embeddings = ids.shape[1] + 4
    with pytest.warns(UserWarning, match=r"1 of 1 answers cut after 5 tokens.*positions"):
        cut = assembled.ask(*asked, max_new_tokens=12)
    assert cut and cut != whole and whole.startswith(cut)
    with pytest.warns(UserWarning, match="cut after 5 tokens"):
        assert "".join(assembled.stream([question_turn(asked[0], 1)], asked[1], max_new_tokens=12)).strip() == cut
    assert assembled.ask(*asked, max_new_tokens=5) == cut  # as long as was asked for: nothing to say
    assembled.model.config.text_config.max_position_embeddings = ids.shape[1] - 1
    with pytest.raises(InputError, match=rf"{ids.shape[1]} tokens.*only {ids.shape[1] - 1} positions"):
        assembled.ask(*asked)


def test_a_conversation_on_the_console(saved, loaded, picture, monkeypatch, capsys):
    lines, prompts = iter([QUESTIONS[0], "And now?", ""]), []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or next(lines))
    chat.main([str(saved / "run"), f"--image={saved / '1.png'}", "--max_new_tokens=5"])
    turns, wanted = [], ""
    for question, images in ((QUESTIONS[0], 1), ("And now?", 0)):
        turns.append(question_turn(question, images))
        answer = "".join(loaded.stream(turns, [picture(1)], max_new_tokens=5))
        turns.append({"from": "gpt", "value": answer.strip()})
        wanted += answer + "\n"
    assert prompts == ["> "] * 3 and capsys.readouterr().out == printable(wanted, keep="\n\t")


def test_one_question_is_answered_and_ends(saved, loaded, capsys, picture):
    chat.main([str(saved / "run"), f"--image={saved / '1.png'}", "--max-new-tokens=5", QUESTIONS[0]])
    answer = loaded.ask(QUESTIONS[0], [picture(1)], max_new_tokens=5)
    assert capsys.readouterr().out.strip() == printable(answer, keep="\n\t")  # a model may write any character


def test_what_is_wrong_is_said_in_one_sentence(saved, tmp_path):
    run = str(saved / "run")
    for arguments, words in [
        ([run, "--image=absent.png", "Is it?"], "absent.png cannot be read as an image"),
        ([run, "--batch=x.jsonl"], "--batch and --out go together"),
        ([run, "--batch=x.jsonl", "--out=y", "Is it?"], "--batch takes its questions"),
        ([run, "--batch=x.jsonl", "--out=y", "--batch_size=0"], "--batch_size: '0' must be at least 1"),
        ([run, "--temperature=nan"], "--temperature: 'nan' must be at least 0"),
        ([run, "--max_new_tokens=0"], "--max_new_tokens: '0' must be at least 1"),
        ([run, "--device=mars", "Is it?"], "device mars: not on this machine"),
        ([run, "--dtype=bfloat"], "--dtype bfloat: did you mean bfloat16"),
        ([run, "Is it?", "--imag=a.png"], "unknown flag --imag: did you mean --image"),
        ([str(tmp_path), "Is it?"], "no model that"),
    ]:
        with pytest.raises(InputError, match=words):
            call("mllm.chat", *arguments)


OLD_CARD = """from PIL import Image

from mllm import chat
from mllm.model import load

model, processor = load("{repo}")
question = chat.question_turn("What is in the picture?", pictures=1)
print(chat.answer(model, processor, [[question]], [Image.open("a.jpg").convert("RGB")])[0])"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [USE["instruct"], OLD_CARD])
def test_the_code_on_model_cards_runs(saved, picture, tmp_path, monkeypatch, capsys, code):
    """Also that of cards published by earlier versions."""
    picture(1).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code.format(repo=saved / "run"), {})
    assert capsys.readouterr().out.strip()


def test_closing_a_stream_ends_the_generation(assembled, picture):
    passes, turns = [], [question_turn(QUESTIONS[0], 1)]
    assembled.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    pieces = assembled.stream(turns, [picture(0)], max_new_tokens=400)
    next(pieces)
    pieces.close()
    done = len(passes)
    assert done < 400
    assert assembled.answer([turns], [[picture(0)]], max_new_tokens=1)
    assert len(passes) == done + 1  # nothing went on behind
