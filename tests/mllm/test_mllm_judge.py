"""Rows are judged once, as training will see them: what is found stays found, and what was mended counts again."""

import hashlib
import json
import multiprocessing
import shutil

import pytest
import torch

from diffclip.base.cache import keep, kept_array
from diffclip.base.errors import InputError
from mllm.conversation import encode, render
from mllm.data.examples import ConversationDataset, TrainingConversations, training_order
from mllm.data.judge import image_problems, judged, token_lengths
from mllm.data.rows import load_rows

INFINITE = float("inf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("DIFFCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def row(n, image="", words=1):
    question = f"{'<image>' + chr(10) if image else ''}Is there a {' '.join(['small blue circle'] * words)}?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes"}]
    return {"id": str(n), "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def folder(tmp_path, picture):
    """Six rows: two show a broken image, one an image that is missing, one a whole one."""
    root = tmp_path / "images"
    root.mkdir()
    picture(1).save(root / "whole.png")
    (root / "broken.png").write_bytes((root / "whole.png").read_bytes()[:300])
    shown = ("whole.png", "broken.png", "", "missing.png", "broken.png", "")
    (tmp_path / "rows.json").write_text(json.dumps([row(n, name, 1 + n) for n, name in enumerate(shown)]))
    return tmp_path


def opened(folder, **options):
    return load_rows([folder / "rows.json"], folder / "images", max_bad_share=INFINITE, **options)


def ids(rows):
    return [one.key.rpartition("id ")[2].strip(")") for one in rows]


def test_rows_with_broken_images_are_left_out_and_come_back_when_these_are_mended(folder, picture, assembled):
    processor = assembled.processor
    first = judged(opened(folder), processor, template="vicuna")
    assert ids(first) == ["0", "2", "5"]
    reasons = {key.rpartition("id ")[2].strip(")"): reason for key, reason in first.problems}
    assert reasons.keys() == {"1", "3", "4"} and "missing.png is not under" in reasons["3"]
    assert "broken.png cannot be read as an image" in reasons["1"] == reasons["4"].replace("row 4", "row 1")
    again = judged(opened(folder), processor, template="vicuna")
    assert (again.problems, again.identity, ids(again)) == (first.problems, first.identity, ids(first))
    picture(2).save(folder / "images/missing.png")
    assert ids(judged(opened(folder), processor, template="vicuna")) == ["0", "2", "3", "5"]
    picture(2).save(folder / "images/broken.png")
    assert ids(judged(opened(folder), processor, template="vicuna")) == ["0", "1", "2", "3", "4", "5"]


def test_images_are_remembered_by_their_content(folder, cache):
    """A broken file whose content is among those that were decoded is not decoded again, under whatever name."""
    assert set(image_problems(opened(folder))) == {1, 4}
    digests = (cache / "decoded.txt").read_text().split()
    content = (folder / "images/whole.png").read_bytes()
    assert digests == [hashlib.blake2b(content, digest_size=16).hexdigest()]
    broken = (folder / "images/broken.png").read_bytes()
    with open(cache / "decoded.txt", "a") as file:
        file.write("0123half a line" + "\n" + hashlib.blake2b(broken, digest_size=16).hexdigest())
    shutil.copy(folder / "images/broken.png", folder / "images/missing.png")
    assert image_problems(opened(folder), fresh=True) == {}


def test_check_sees_what_happened_to_an_image_since(folder):
    assert 0 not in image_problems(opened(folder))
    (folder / "images/whole.png").write_bytes(b"no image any more")
    assert 0 in image_problems(opened(folder), fresh=True)
    (folder / "images/whole.png").unlink()
    assert len(opened(folder)) == 5 and len(opened(folder, fresh=True)) == 4


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_lengths_are_those_of_the_examples_and_are_counted_once(folder, cache, assembled, template):
    processor = assembled.processor
    rows = opened(folder, template=template)
    rows = rows.without(image_problems(rows))
    dataset = ConversationDataset(rows, processor, template=template)
    tokenizer = processor.tokenizer
    wanted = [len(encode(render(one.conversation, template), tokenizer, 16)["input_ids"]) for one in rows]
    assert dataset.lengths == wanted == [len(dataset[i]["input_ids"]) for i in range(len(rows))]
    (kept,) = cache.glob("*.int32")
    keep(kept, (kept_array(kept) + 1).data)  # if they were counted again, it would not be seen
    assert token_lengths(rows, tokenizer, 16, template).tolist() == [n + 1 for n in wanted]
    kept.write_bytes(kept.read_bytes()[:-3])  # damaged: counted again
    assert token_lengths(rows, tokenizer, 16, template).tolist() == wanted
    tokenizer.add_tokens(["circle"])
    assert token_lengths(rows, tokenizer, 16, template).tolist() != wanted  # another tokenizer


def test_rows_that_do_not_fit_are_named_with_a_remedy_that_works(folder, assembled):
    rows = [row(0), row(1, "whole.png"), row(2, words=90), row(3, "whole.png", words=90)]
    (folder / "rows.json").write_text(json.dumps(rows))
    processor = assembled.processor
    settings = {"template": "vicuna", "max_length": 2048}
    lengths = ConversationDataset(opened(folder), processor, template="vicuna").lengths
    found = judged(opened(folder), processor, **settings, positions=max(lengths) - 1)
    ((key, reason),) = found.problems
    assert "id 3" in key and f"has {max(lengths)} tokens, more than the {max(lengths) - 1} positions" in reason
    assert ids(judged(opened(folder), processor, **settings, positions=max(lengths))) == ["0", "1", "2", "3"]
    cut = judged(opened(folder), processor, template="vicuna", max_length=lengths[1], positions=lengths[1])
    assert [reason for _, reason in cut.problems] == [
        f"no supervised token in the first {lengths[1]}; raise max_length"
    ] * 2
    first = next(
        i
        for i, label in enumerate(ConversationDataset(opened(folder), processor, template="vicuna")[1]["labels"])
        if label != -100
    )
    inside = judged(opened(folder), processor, template="vicuna", max_length=first + 1)
    assert "1" in ids(inside)  # one supervised token is left
    assert all(
        len(ConversationDataset(inside, processor, template="vicuna", max_length=first + 1)[i]["labels"]) <= first + 1
        for i in range(len(inside))
    )


def test_an_image_that_max_length_cuts_is_named(folder, assembled, picture):
    picture(2).save(folder / "images/b.png")
    turns = [
        {"from": who, "value": text}
        for who, text in (("human", "<image>\na"), ("gpt", "no"), ("human", "<image>\nb"), ("gpt", "no"))
    ]
    (folder / "rows.json").write_text(json.dumps([{"image": ["whole.png", "b.png"], "conversations": turns}]))
    (length,) = ConversationDataset(opened(folder), assembled.processor, template="vicuna").lengths
    ((_, reason),) = judged(opened(folder), assembled.processor, template="vicuna", max_length=length - 20).problems
    assert reason == f"max_length {length - 20} cuts an image off; raise it"


def test_a_row_that_breaks_after_it_was_judged_is_replaced_and_named(folder, assembled, picture):
    for n in range(4):
        picture(n).save(folder / f"images/{n}.png")
    (folder / "rows.json").write_text(json.dumps([row(n, f"{n}.png", 1 + n) for n in range(4)]))
    dataset = ConversationDataset(opened(folder), assembled.processor, template="vicuna")
    order = training_order(dataset, "random", 4, 3, seed=0)
    (folder / "images/2.png").write_bytes(b"gone bad")

    def items():
        made = TrainingConversations(dataset, order, seed=7, bad_samples=folder / "bad_samples.jsonl")
        return [made[k] for k in range(len(made))]

    first, again = items(), items()
    for k, (one, two) in enumerate(zip(first, again)):
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert (len(one["input_ids"]) == dataset.lengths[order[k]]) == (order[k] != 2)
    named = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert named == [named[0]] * 2 and named[0]["key"].endswith("row 2 (id 2)")
    assert named[0]["reason"].startswith(str(folder / "images/2.png"))


def test_too_many_rows_that_break_end_the_run(folder, assembled):
    (folder / "rows.json").write_text(json.dumps([row(0, "whole.png"), row(1)]))
    dataset = ConversationDataset(opened(folder), assembled.processor, template="vicuna")
    (folder / "images/whole.png").unlink()
    settings = {"seed": 0, "bad_samples": folder / "bad.jsonl", "max_bad_share": 0.1}
    made = TrainingConversations(dataset, [1] * 999 + [0] + [1] * 50 + [0] * 400, **settings)
    for k in range(900, 1100):
        made[k]  # the share is looked at after 1,000
    with pytest.raises(InputError, match=r"rows could not be read, more than max_bad_share 0.1: see .*bad\.jsonl"):
        for k in range(len(made)):
            made[k]
    nothing = TrainingConversations(dataset, [0, 0], **settings)
    with pytest.raises(InputError, match=r"row 0 .*whole\.png is no longer under"):
        nothing[0]


def test_a_cache_that_is_damaged_is_made_again_and_one_that_cannot_be_written_is_named(folder, cache, monkeypatch):
    wanted = ids(opened(folder))
    (kept,) = cache.glob("*.arrow")
    for content in (b"", b"damaged", kept.read_bytes()[:-100], kept.read_bytes()[:60]):
        kept.write_bytes(content)
        assert ids(opened(folder)) == wanted
    image_problems(opened(folder))
    (verdicts,) = cache.glob("*images.json")
    verdicts.write_text('{"half')
    assert set(image_problems(opened(folder))) == {1, 4}
    (folder / "file").write_text("")
    monkeypatch.setenv("DIFFCLIP_CACHE", str(folder / "file"))
    with pytest.raises(InputError, match="set DIFFCLIP_CACHE to another folder"):
        opened(folder)


def open_in_a_process(folder, queue):
    rows = opened(folder)
    queue.put((ids(rows), rows.problems, sorted(image_problems(rows))))


def test_processes_that_start_together_judge_once_and_agree(folder, cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=open_in_a_process, args=(folder, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(one == found[0] for one in found) and found[0][2] == [1, 4]
    assert len((cache / "decoded.txt").read_text().split()) == 1  # four would have decoded it four times


def test_rows_can_be_left_out_up_to_a_share_but_never_all_of_them(folder):
    with pytest.raises(InputError, match=r"row 3.*missing\.png"):
        load_rows([folder / "rows.json"], folder / "images")
    with pytest.raises(InputError, match=r"1 of 6 rows have problems, more than max_bad_share 0.1: .*mend the data"):
        load_rows([folder / "rows.json"], folder / "images", max_bad_share=0.1)
    assert len(load_rows([folder / "rows.json"], folder / "images", max_bad_share=0.2)) == 5
    (folder / "rows.json").write_text(json.dumps([row(0, "missing.png")]))
    with pytest.raises(InputError, match=r"missing\.png"):
        load_rows([folder / "rows.json"], folder / "images", max_bad_share=1)
