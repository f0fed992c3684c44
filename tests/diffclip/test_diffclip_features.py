"""The feature cache: the model's own features, never stale, never half written; broken images are named."""

import os

import pytest
import torch
from PIL import Image
from torchvision import transforms

from diffclip.base.backbones import open_clip
from diffclip.base.errors import InputError
from diffclip.benchmarks import features
from diffclip.benchmarks.features import products_in_tf32
from diffclip.benchmarks.images import Images, read_class_folders

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "native": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "timm": {"image_size": 16, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
}


def tiny(tower="native", seed=0):
    torch.manual_seed(seed)
    return open_clip.model.CLIP(24, TOWERS[tower], TEXT).eval()


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


PREPROCESS = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])


def encoder(model, cache=None, **options):
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return features.Encoder(model, PREPROCESS, tokenizer, cache_dir=cache, batch_size=4, quiet=True, **options)


def images_of(folder):
    return read_class_folders(folder, {"cat": 0, "dog": 1})


@pytest.mark.parametrize("tower", TOWERS)
def test_features_are_the_models(folder, tower):
    model = tiny(tower)
    found = encoder(model).images(images_of(folder))
    images = torch.stack([PREPROCESS(image) for image, _ in images_of(folder)])
    with torch.no_grad():
        after = model.encode_image(images)
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert (found.after - after).abs().max() < 1e-5
    # the projection maps one to the other
    visual = model.visual
    projected = visual.head(found.before) if tower == "timm" else found.before @ visual.proj
    assert (projected - after).abs().max() < 1e-5
    assert (model.encode_image(images) - after).abs().max() < 1e-6  # the tower was left as it was


def test_second_pass_reads_the_cache(folder, tmp_path):
    model = tiny()
    first = encoder(model, tmp_path / "cache").images(images_of(folder))
    model.encode_image = model.visual.forward = None  # any further encoding would fail
    second = encoder(model, tmp_path / "cache").images(images_of(folder))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_whatever_the_features_depend_on_makes_a_new_entry(folder, tmp_path):
    cache = tmp_path / "cache"

    def entries():
        return len(list(cache.iterdir()))

    encoder(tiny(), cache).images(images_of(folder))
    changed = tiny()
    with torch.no_grad():
        changed.visual.proj[0, 0] += 1e-3
    new = encoder(changed, cache).images(images_of(folder))
    assert entries() == 2
    assert torch.equal(new.after, encoder(changed).images(images_of(folder)).after)
    other = encoder(tiny(), cache)
    other.preprocess = transforms.Compose([transforms.Resize((16, 16), 3), transforms.ToTensor()])
    other.images(images_of(folder))
    assert entries() == 3
    encoder(tiny(), cache, precision="bfloat16").images(images_of(folder))
    assert entries() == 4
    file = folder / "cat" / "0.png"
    Image.new("RGB", (20, 24)).save(file)
    os.utime(file, ns=(1, 1))
    new = encoder(tiny(), cache).images(images_of(folder))
    assert entries() == 5
    assert torch.equal(new.after, encoder(tiny()).images(images_of(folder)).after)


def test_a_transform_with_functions_has_a_stable_key(folder, tmp_path):
    def convert():
        def to_rgb(image):
            return image.convert("RGB")

        return to_rgb

    for function in (convert(), convert()):  # two addresses
        one = encoder(tiny(), tmp_path / "cache")
        one.preprocess = transforms.Compose([function, transforms.Resize((16, 16)), transforms.ToTensor()])
        one.images(images_of(folder))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_tf32_is_on_within_a_pass_and_needs_a_gpu():
    with products_in_tf32():
        assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(InputError, match="precision tf32: the cpu has none"):
        encoder(tiny(), None, precision="tf32")


def test_low_precision_is_close_and_half_the_size(folder, tmp_path):
    exact = encoder(tiny()).images(images_of(folder)).after
    low = encoder(tiny(), tmp_path / "cache", precision="bfloat16").images(images_of(folder)).after
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, low).min() > 0.999
    assert not torch.equal(exact, low)


@pytest.mark.slow
def test_texts_are_cached_by_their_tokens(tmp_path):
    model = tiny()
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    found = encoder(model, tmp_path / "cache").texts(["a red circle", "two dogs", "a cat"] * 3)
    with torch.no_grad():
        assert (found - model.encode_text(tokenizer(["a red circle", "two dogs", "a cat"] * 3))).abs().max() < 1e-5
    encoder(model, tmp_path / "cache").texts(["A red  circle", "two dogs", "a cat"] * 3)  # the same tokens
    assert len(list((tmp_path / "cache").iterdir())) == 1
    encoder(model, tmp_path / "cache").texts(["a red circle"])
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_line(folder, tmp_path, workers):
    broken = folder / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(InputError) as caught:
        encoder(tiny(), tmp_path / "cache", workers=workers).images(images_of(folder))
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("diffclip.base.files.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        features.save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_class_folder_errors(folder):
    (folder / "bird").mkdir()
    with pytest.raises(InputError, match=r"bird has no prompt name"):
        images_of(folder)
    with pytest.raises(InputError, match="bird holds no images"):
        read_class_folders(folder, {"cat": 0, "dog": 1, "bird": 2})
    with pytest.raises(InputError, match="gone does not exist"):
        read_class_folders(folder / "gone", {})
    with pytest.raises(InputError, match="no class folders"):
        read_class_folders(folder / "bird", {})


def test_palette_and_alpha_images_become_rgb(tmp_path):
    for mode in ("P", "RGBA", "L", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 5)).save(path)
        image, label = Images([str(path)], [path], [7])[0]
        assert (image.mode, label) == ("RGB", 7)


@pytest.mark.parametrize("ranks", [1, 2, 3, 9])
def test_ranks_make_a_list_together_in_its_order(monkeypatch, ranks):
    work, shares = lambda first, step: [*range(7)][first::step], []
    monkeypatch.setattr(features.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(features.dist, "get_world_size", lambda: ranks)

    def gather(every, own):
        every[:] = [work(rank, ranks) for rank in range(ranks)]
        shares.append(own)

    monkeypatch.setattr(features.dist, "all_gather_object", gather)
    for rank in range(ranks):
        monkeypatch.setattr(features.dist, "get_rank", lambda rank=rank: rank)
        assert features.shared(work) == [*range(7)]
    assert sorted(item for share in shares for item in share) == [*range(7)]  # each is made once
