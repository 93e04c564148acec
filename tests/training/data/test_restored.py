"""Samples with a restoration network's results: computed once, kept, grown, turned alike."""

import dataclasses
import json
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tadsr import TADSRError
from tadsr.degradation import PRESETS
from tadsr.errors import CheckpointError, DataError
from tadsr.training import DataConfig, RestoredConfig
from tadsr.training.data import load_restorer, open_data
from tadsr.training.data import restored as module
from tadsr.training.data.samples import collate

CROP_PX = 32


class Doubler:
    """The darkened nearest enlargement, which turns with what it enlarges; counts its calls."""

    def __init__(self, scale=4):
        self.scale = scale
        self.num_images = 0

    def __call__(self, lq):
        self.num_images += len(lq)
        return F.interpolate(lq, scale_factor=self.scale) / 2


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(module, "SAMPLES_PER_FILE", 4)


def configure(photos, folder, num_samples=8, **changes):
    restored = RestoredConfig(str(folder), num_samples=num_samples)
    settings = {
        "crop_px": CROP_PX, "rotate": True, "num_workers": 0, "restored": restored,
        "degradation": PRESETS["mild"],  # ranges, not a name
    }  # fmt: skip
    return DataConfig(str(photos), **settings | changes)


def prepared(config, restorer=None, seed=0):
    data = open_data(config, seed=seed, restorer=restorer)
    data.prepare("cpu")
    return data


def first(data, count):
    return [data.dataset[i] for i in range(count)]


def test_each_sample_carries_the_result_of_its_own_lq(photos, tmp_path):
    samples = first(prepared(configure(photos, tmp_path), Doubler()), 16)
    for sample in samples:
        expect = F.interpolate(sample.lq / 2 + 0.5, scale_factor=4) / 2
        torch.testing.assert_close(sample.restored / 2 + 0.5, expect, atol=1 / 255, rtol=0)
    batch = collate(samples[:2])
    assert batch.restored.shape == batch.lq.shape == batch.hq.shape == (2, 3, CROP_PX, CROP_PX)
    # Both epochs show every sample, turned anew.
    epochs = [
        {s.hq.sort().values.sum().item(): s.hq for s in e} for e in (samples[:8], samples[8:])
    ]
    keys = [sorted(round(key, 2) for key in epoch) for epoch in epochs]
    assert keys[0] == keys[1]
    assert any(not a.equal(b) for a in epochs[0].values() for b in epochs[1].values())


def test_what_is_kept_is_not_computed_again(photos, tmp_path):
    config = configure(photos, tmp_path)
    restorer = Doubler()
    before = first(prepared(config, restorer), 8)
    assert restorer.num_images == 8
    (tmp_path / "samples_000001.safetensors").unlink()
    again = Doubler()
    after = first(prepared(config, again), 8)
    assert again.num_images == 4
    assert all(
        a.hq.equal(b.hq) and a.restored.equal(b.restored)
        for a, b in zip(before, after, strict=True)
    )
    files = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    more = Doubler()
    prepared(configure(photos, tmp_path, num_samples=10), more)
    assert more.num_images == 4
    assert all((tmp_path / name).read_bytes() == content for name, content in files.items())
    # Whole sets need no network; the run's seed changes only order and turns.
    other = first(prepared(config, seed=7), 8)
    assert {s.names for s in other} == {s.names for s in before}
    assert not all(a.hq.equal(b.hq) for a, b in zip(before, other, strict=True))


def test_sets_from_before_a_setting_was_there_are_taken_up(photos, tmp_path):
    config = configure(photos, tmp_path)
    before = first(prepared(config, Doubler()), 1)
    (path,) = tmp_path.rglob("samples.json")
    facts = json.loads(path.read_text())
    assert facts.pop("max_zoom") == 1
    path.write_text(json.dumps(facts))
    assert first(prepared(config), 1)[0].hq.equal(before[0].hq)


@pytest.mark.parametrize(
    "changes",
    [{"degradation": "web"}, {"web_probability": 0.5}, {"min_zoom": 0.5}, {"max_zoom": 2}],
)
def test_samples_made_otherwise_are_refused(photos, tmp_path, changes):
    prepared(configure(photos, tmp_path), Doubler())
    with pytest.raises(DataError, match=next(iter(changes))):
        open_data(configure(photos, tmp_path, **changes), seed=0)


def test_what_cannot_be_computed_is_said_at_once(photos, tmp_path):
    with pytest.raises(DataError, match="no network"):
        open_data(configure(photos, tmp_path / "a"), seed=0)
    with pytest.raises(DataError, match="enlarge by 4"):
        prepared(configure(photos, tmp_path / "b"), Doubler(scale=2))
    with pytest.raises(DataError, match="1/4 of its HQ"):
        prepared(configure(photos, tmp_path / "c", lq=str(photos)), Doubler())
    with pytest.raises(ValueError, match=r"data\.restored must be left out"):
        open_data(configure("owner/photos", tmp_path / "d"), seed=0)
    with pytest.raises(ValueError, match="num_samples"):
        RestoredConfig("folder", num_samples=0)


def test_spandrel_is_asked_for_where_it_is_missing(photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    config = configure(photos, tmp_path)
    restored = dataclasses.replace(config.restored, network="network.pth")
    with pytest.raises(TADSRError, match=r"tadsr\[train\]"):
        open_data(dataclasses.replace(config, restored=restored), seed=0)


def test_a_checkpoint_is_loaded_by_spandrel(tmp_path):
    try:
        from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet
    except Exception as error:  # its torchvision may be built for another torch
        pytest.skip(f"spandrel does not import: {error}")
    torch.manual_seed(0)
    network = RRDBNet(in_nc=3, out_nc=3, num_filters=8, num_blocks=1, scale=4)
    path = tmp_path / "network.pth"
    torch.save(network.state_dict(), path)
    lq = torch.rand(1, 3, 8, 10)
    with torch.inference_mode():
        expect = network.eval()(lq).clamp(0, 1)
        torch.testing.assert_close(load_restorer(path, 4)(lq), expect)
    with pytest.raises(CheckpointError, match="enlarge it by 2"):
        load_restorer(path, 2)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="spandrel knows"):
        load_restorer(tmp_path / "other.pth", 4)


class Scripted(torch.nn.Module):
    """A TorchScript file whose loading runs code; `torch.jit.load` would print."""

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.training,)

    @torch.jit.export
    def __setstate__(self, state: tuple[bool]):
        print("executed")  # noqa: T201
        self.training = state[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_network_that_is_a_program_is_refused(tmp_path, monkeypatch, capfd):
    # It is refused before the library, which need not be there, sees it.
    monkeypatch.setitem(sys.modules, "spandrel", ModuleType("spandrel"))
    torch.jit.script(Scripted()).save(tmp_path / "network.pt")
    with pytest.raises(CheckpointError, match="must hold tensors as torch saves them"):
        load_restorer(tmp_path / "network.pt", 4)
    assert "executed" not in capfd.readouterr().out
