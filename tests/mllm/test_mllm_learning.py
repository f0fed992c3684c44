"""Training and asking fit together: what was learnt from rows comes back through the evaluation prompt."""

import json

import pytest
from test_mllm_pope_diagnose import teach

from mllm.conversation import prompt


@pytest.mark.slow
def test_answers_that_depend_on_the_picture_are_learnt_and_come_back(assembled, picture, tmp_path):
    model, processor = assembled
    truth = {
        (i, thing): ("Yes", "No")[(i + n) % 2] for i in range(4) for n, thing in enumerate(("red square", "green star"))
    }
    questions = {key: f"<image>\nIs there a {key[1]} in the image?" for key in truth}
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [
        {
            "id": str(key),
            "image": f"{key[0]}.png",
            "conversations": [{"from": "human", "value": questions[key]}, {"from": "gpt", "value": answer}],
        }
        for key, answer in truth.items()
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    teach(model, processor, tmp_path / "rows.json", tmp_path)
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        images=[picture(i) for i, _ in truth],
        text=[prompt([{"from": "human", "value": questions[key]}], "vicuna") for key in truth],
        padding=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    answers = [a.strip() for a in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert answers == list(truth.values())
