"""The contrastive loss over real gloo ranks, against the official code and against one big batch."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.nn import functional as F

from diffclip.recipe import accuracy_in_batch, contrastive_loss

PAIRS, WIDTH = 8, 16


def random_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image_embed": torch.randn(PAIRS, WIDTH, generator=generator),
        "text_embed": torch.randn(PAIRS, WIDTH, generator=generator),
        "logit_scale_param": torch.tensor([2.0]),
    }


def one_rank(rank: int, world: int, folder: str, inputs: dict[str, torch.Tensor], with_grad: bool) -> None:
    """Loss and gradients of one rank's share, as DDP would average them, saved to `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mine = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    image = inputs["image_embed"][mine].clone().requires_grad_()
    text = inputs["text_embed"][mine].clone().requires_grad_()
    scale = inputs["logit_scale_param"].clone().requires_grad_()
    loss = contrastive_loss(with_grad)(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale.exp())
    loss.backward()
    torch.save(
        {"loss": loss.detach(), "image": image.grad / world, "text": text.grad / world, "scale": scale.grad},
        f"{folder}/{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


def all_ranks(world: int, inputs: dict[str, torch.Tensor], with_grad: bool) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_rank, args=(world, folder, inputs, with_grad), nprocs=world, start_method="fork")
        shares = [torch.load(Path(folder) / f"{r}.pt", weights_only=True) for r in range(world)]
    return {
        "losses": torch.stack([s["loss"] for s in shares]).flatten(),
        "image": torch.cat([s["image"] for s in shares]),
        "text": torch.cat([s["text"] for s in shares]),
        "scale": torch.stack([s["scale"] for s in shares]).mean(),
    }


def one_big_batch(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    image = inputs["image_embed"].clone().requires_grad_()
    text = inputs["text_embed"].clone().requires_grad_()
    scale = inputs["logit_scale_param"].clone().requires_grad_()
    similarity = scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    own = torch.arange(PAIRS)
    loss = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    loss.backward()
    return {"loss": loss.detach(), "image": image.grad, "text": text.grad, "scale": scale.grad}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_official_loss_and_gradients_without_gradient_through_the_gather(golden, world):
    folder = golden("10_loss_ddp")
    stored = load_file(folder / "loss.safetensors")
    expected = json.loads((folder / "expected.json").read_text())[f"world{world}"]
    inputs = {name: stored[name] for name in ("image_embed", "text_embed", "logit_scale_param")}
    inputs["logit_scale_param"] = inputs["logit_scale_param"].reshape(1)
    ours = all_ranks(world, inputs, with_grad=False)
    torch.testing.assert_close(ours["losses"], torch.tensor(expected["per_rank_loss"]), atol=2e-6, rtol=0)
    for side in ("image", "text"):
        wanted = stored[f"world{world}.grad.{side}_embed"]
        torch.testing.assert_close(ours[side], wanted, atol=2e-6, rtol=0)
    assert ours["scale"].item() == pytest.approx(expected["grad_logit_scale_param_mean"], abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_with_gradient_through_the_gather_ranks_equal_one_big_batch(world):
    inputs = random_inputs()
    ours, wanted = all_ranks(world, inputs, with_grad=True), one_big_batch(inputs)
    assert ours["losses"].mean().item() == pytest.approx(wanted["loss"].item(), rel=1e-5)
    for side in ("image", "text"):
        torch.testing.assert_close(ours[side], wanted[side], rtol=1e-5, atol=1e-7)
    assert ours["scale"].item() == pytest.approx(wanted["scale"].item(), rel=1e-5)


def test_accuracy_counts_images_that_find_their_caption():
    assert accuracy_in_batch(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]) == 0.5
