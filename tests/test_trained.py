"""Networks with trained weights: what `load` gives is what the file holds, and the file is what the training command writes."""

import fnmatch
import importlib.util
import lzma
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphwright import models
from graphwright.ir.errors import ArtifactError, InputError
from graphwright.models import decoder, denoising, digits, dit, sampling, text, train
from graphwright.models.trained_weights import read_weights, write_weights

TRAINED = [(name, size) for name in models.names() for size in models.trained(name)]

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the digits come with scikit-learn: pip install 'graphwright[train]'"
)


def parameters(module):
    return dict(module.named_parameters())


def assert_same_parameters(a, b):
    torch.testing.assert_close(parameters(a), parameters(b), rtol=0, atol=0)


# --- loading ---------------------------------------------------------------------------------------------------------------


def test_the_digits_of_dit_and_the_text_of_language_models_are_trained():
    assert TRAINED == [("dit", "digits"), ("decoder", "text"), ("rat", "text"), ("moe_dlm", "text")]
    with pytest.raises(InputError, match="no network 'resnet'"):
        models.trained("resnet")


@pytest.mark.parametrize(("name", "size"), TRAINED)
def test_a_trained_network_is_what_its_file_holds_and_nothing_else(name, size):
    module, _, _ = models.load(name, size)
    stored = load_file(models.weights_path(name, size))
    torch.testing.assert_close(
        {key: p.detach() for key, p in parameters(module).items()}, {k: t.float() for k, t in stored.items()}, rtol=0, atol=0
    )
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize(("name", "size"), TRAINED)
def test_the_seed_of_a_trained_network_draws_its_inputs_alone(name, size):
    (first, args, kwargs), (again, again_args, _), (other, other_args, _) = (models.load(name, size, seed=seed) for seed in (3, 3, 4))
    assert_same_parameters(first, other)
    assert torch.equal(args[0], again_args[0]) and not torch.equal(args[0], other_args[0])
    with torch.no_grad():
        output = first(*args, **kwargs)
        assert torch.equal(output, again(*args, **kwargs)) and output.isfinite().all()


@pytest.mark.parametrize(("name", "size"), TRAINED)
def test_a_look_on_the_meta_device_has_no_storage(name, size):
    with torch.device("meta"):
        module, args, _ = models.load(name, size)
    assert args[0].is_meta and all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize(("name", "size"), TRAINED)
def test_weights_come_with_the_package_in_at_most_8_megabytes(name, size):
    path = models.weights_path(name, size)
    setuptools = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert any(fnmatch.fnmatch(path.name, pattern) for pattern in setuptools["package-data"]["graphwright.models"])
    assert path.stat().st_size <= 8_000_000


def test_weights_are_read_in_the_default_type():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        doubled, args, _ = models.load("dit", "digits")
    finally:
        torch.set_default_dtype(before)
    assert args[0].dtype == torch.float64
    torch.testing.assert_close(parameters(doubled), parameters(models.load("dit", "digits")[0].double()), rtol=0, atol=0)


# --- the trained diffusion model -------------------------------------------------------------------------------------------


@needs_digits
def test_the_trained_dit_draws_digits_that_are_recognised(one_thread):
    module, _, _ = models.load("dit", "digits")
    labels = torch.arange(40) % digits.NUM_CLASSES
    noise = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    measured = digits.quality(sampling.ddim(module, noise, labels, steps=10), labels)
    assert measured.accuracy > 0.8
    assert measured.frechet_distance < 8  # 40 images of the data are at 4.3, noise at 50 and more


@needs_digits
@torch.no_grad()
def test_the_trained_dit_predicts_noise_and_no_variance(one_thread):
    module, _, _ = models.load("dit", "digits")
    held_out = digits.halves()[1]
    images, labels = held_out.images[:100], held_out.labels[:100]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.arange(100) * 10
    predicted = module(sampling.noised(images, noise, timestep), timestep, labels)
    assert (predicted[:, :1] - noise).square().mean() < 0.25  # 1 is what a network that predicts nothing gets
    assert not predicted[:, 1:].any()


# --- the trained language model --------------------------------------------------------------------------------------------


def test_the_vocabulary_is_that_of_the_trained_decoder():
    assert len(text.vocabulary()) == decoder.SIZES["text"].vocabulary


def held_out_perplexity(layers):
    module, _, _ = models.load("decoder", "text")
    return text.perplexity(decoder.with_layers(module, layers), text.encode(text.held_out()), batch=8)


def test_the_trained_decoder_knows_more_of_a_text_than_a_compressor_does(one_thread):
    compressed = lzma.compress(text.held_out().encode(), preset=9 | lzma.PRESET_EXTREME)
    assert held_out_perplexity(range(12)).bits_per_byte < 0.8 * 8 * len(compressed) / len(text.held_out().encode())


def test_the_trained_decoder_does_without_layers_the_better_the_fewer_are_gone(one_thread):
    without = [held_out_perplexity(range(12 - gone)).per_token for gone in (0, 2, 4, 6)]
    assert without == sorted(without)
    assert without[1] < 1.02 * without[0] and without[3] < 1.2 * without[0]  # 1.01 and 1.15


def test_the_trained_decoder_looks_back(one_thread):
    module, _, _ = models.load("decoder", "text")
    ids = text.encode(text.held_out())[:4097]
    near, far = (text.perplexity(module, ids, length, batch=2048 // length).per_token for length in (16, 256))
    assert far < 0.8 * near


def test_the_trained_recurrence_looks_further_back_than_a_chunk_and_its_windows(one_thread):
    module, _, _ = models.load("rat", "text")
    ids = text.encode(text.held_out())[:4097]
    near, far = (text.perplexity(module, ids, length, batch=2048 // length).per_token for length in (16, 256))
    assert far < 0.8 * near < 80


def test_the_trained_denoiser_reads_what_is_not_masked(one_thread):
    module, _, _ = models.load("moe_dlm", "text")
    counts = torch.tensor(text.encode(text.training())).bincount(minlength=module.mask_id).double() + 1
    ids = torch.tensor(text.encode(text.held_out()))[:4096]
    by_frequency = -(counts / counts.sum()).log()[ids].mean()
    assert denoising.held_out_loss(module, ids, module.mask_id, draws=1) < 0.85 * by_frequency


# --- files of weights ------------------------------------------------------------------------------------------------------


def test_weights_survive_a_file_up_to_float16(tmp_path):
    network, other = nn.Linear(5, 3), nn.Linear(5, 3)
    write_weights(network, tmp_path / "w.safetensors")
    read_weights(other, tmp_path / "w.safetensors")
    assert_same_parameters(network.half().float(), other)
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]


def test_buffers_are_no_weights(tmp_path):
    network, _, _ = models.load("dit", "tiny")
    write_weights(network, tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == parameters(network).keys()


def test_weights_that_float16_cannot_hold_are_not_written(tmp_path):
    network = nn.Linear(5, 3)
    nn.init.constant_(network.bias, 1e6)
    with pytest.raises(ArtifactError, match="bias holds numbers that are not finite in float16"):
        write_weights(network, tmp_path / "w.safetensors")
    assert [*tmp_path.iterdir()] == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_weights(nn.Linear(5, 3), path)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (nn.Linear(5, 3, bias=False), r"bias is missing there and \(3,\) here"),
        (nn.Linear(4, 3), r"weight is \(3, 4\) there and \(3, 5\) here"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, stored, says):
    write_weights(stored, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=says):
        read_weights(nn.Linear(5, 3), tmp_path / "w.safetensors")


def test_weights_that_are_missing_or_damaged_are_told(tmp_path):
    with pytest.raises(ArtifactError, match="there are no weights at .*w.safetensors: install"):
        read_weights(nn.Linear(5, 3), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(models.weights_path("dit", "digits").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cannot be read as weights"):
        read_weights(nn.Linear(5, 3), tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="cannot be read as weights"):
        read_weights(nn.Linear(5, 3), tmp_path)


# --- the training command --------------------------------------------------------------------------------------------------


def test_fit_ends_at_the_least_squares_with_a_network_that_is_ready_to_use(one_thread):
    torch.manual_seed(0)
    x, true = torch.randn(64, 4), torch.tensor([[0.3, -0.2, 0.1, 0.4]])
    network = nn.Linear(4, 1, bias=False)
    losses = []
    fitted = train.fit(
        network, lambda module: (module(x) - x @ true.T).square().mean(), 2000, lambda done, loss: losses.append((done, loss))
    )
    # the weight decay of 0.01 pulls each weight by about that share of itself
    torch.testing.assert_close(fitted.weight, true, rtol=0.02, atol=0.01, check_stride=False)
    assert not fitted.training and not fitted.weight.requires_grad
    assert [done for done, _ in losses] == [*range(1, 2001)] and losses[-1][1] < losses[0][1] / 100


@needs_digits
def test_training_writes_a_file_that_loads_and_one_seed_gives_one_file(tmp_path, one_thread, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "again", "other")]
    state = torch.get_rng_state()
    for path, seed in zip(files, (1, 1, 2)):
        assert train.main(["dit", "--steps", "2", "--out", str(path), "--seed", str(seed)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (path.read_bytes() for path in files)
    assert first == again and first != other
    read_weights(dit.DiT(dit.SIZES["digits"]), files[0])
    assert f"wrote {files[0]}" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_one_seed_gives_one_decoder_and_the_averaged_weights_of_all_layers(one_thread):
    first, again, other = (train.train_decoder(2, seed) for seed in (1, 1, 2))
    assert_same_parameters(first, again)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert len(first.layers) == 12 and not first.training


def test_a_decoder_is_trained_without_layers_the_deeper_the_more_often():
    torch.manual_seed(0)
    drawn = [train._drawn_layers(12) for _ in range(2000)]
    assert all(layers == sorted({*layers}) for layers in drawn)
    kept = torch.tensor([sum(layer in layers for layers in drawn) / 2000 for layer in range(12)])
    torch.testing.assert_close(kept, torch.linspace(1, 0.5, 12), rtol=0, atol=0.05)  # 4.5 deviations of a share of 2000


@needs_digits
def test_a_pipe_sees_no_bar_and_the_file_lies_in_the_current_folder_unless_told(tmp_path):
    command = [sys.executable, "-m", "graphwright.models.train", "dit", "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [each.name for each in tmp_path.iterdir()] == ["dit_digits.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "network"),
        (["resnet"], "'resnet'"),
        (["dit", "--steps", "0"], "--steps: wants a whole number from 1, not '0'"),
        (["dit", "--steps", "many"], "not 'many'"),
        (["dit", "--seed", "-1"], "--seed: wants a whole number from 0, not '-1'"),
        (["dit", "--seed", str(2**63)], "--seed"),
        (["dit", "--out", "missing/w.safetensors"], "there is no folder missing"),
        (["dit", "--out", "."], "is a folder; --out wants a file"),
        (["dit", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line_before_any_training(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1 and says in told
    assert [*tmp_path.iterdir()] == []


def test_without_scikit_learn_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    digits.halves.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit):
        train.main(["dit", "--out", str(tmp_path / "w.safetensors")])
    assert "pip install 'graphwright[train]'" in capsys.readouterr().err
