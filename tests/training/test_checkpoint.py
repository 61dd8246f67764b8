import itertools
import json

import pytest
import torch

from dico_t2i import remote
from dico_t2i.runs.checkpoint import (
    CheckpointError,
    DamagedError,
    Piece,
    candidates,
    check_shapes,
    fill,
    manifest_hash,
    newest_checkpoint,
    read_weights,
    verify,
)
from dico_t2i.runs.shard_file import CHUNK
from dico_t2i.training.checkpoint_writer import CheckpointWriter
from dico_t2i.training.retention import Retention

SHAPES = {"a": torch.Size((3, 4)), "b": torch.Size((5,))}


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for kind in ("weight", "exp_avg", "ema_0.9")
    }


def pieces(content, cuts):
    """Pieces of each parameter between the cuts, flat positions."""
    for name, shape in SHAPES.items():
        edges = [0, *(c for c in cuts if c < shape.numel()), shape.numel()]
        for start, stop in itertools.pairwise(edges):
            yield Piece(name, start, {kind: content[kind][name].view(-1)[start:stop] for kind in content})


def save(folder, content, step, world=1, loss=1.0, retention=None):
    writers = [CheckpointWriter(folder, rank, world, retention or Retention(3)) for rank in range(world)]
    writers[0].prepare(step)
    for rank in reversed(range(world)):
        mine = [piece for number, piece in enumerate(pieces(content, (2, 7))) if number % world == rank]
        writers[rank].save(step, mine, SHAPES, {"position": 8 * step, "optimizer_steps": step, "loss": loss})
    for writer in writers:
        writer.wait()
        assert writer.error is None


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("cuts", [(), (1, 3, 4, 9), (6,)])
def test_any_cut_reads_what_any_ranks_wrote(tmp_path, world, cuts):
    content = weights(0)
    save(tmp_path, content, 7, world)
    checkpoint = newest_checkpoint(tmp_path)
    verify(checkpoint)
    assert (checkpoint.step, checkpoint.position, checkpoint.world) == (7, 56, world)
    empty = {kind: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for kind in content}
    fill(checkpoint, pieces(empty, cuts))
    for kind, parameters in content.items():
        whole = dict(read_weights(checkpoint, kind))
        for name, value in parameters.items():
            assert torch.equal(empty[kind][name], value)
            assert torch.equal(whole[name], value)


def test_an_average_that_was_not_kept_starts_from_the_weights(tmp_path):
    content = weights(0)
    save(tmp_path, content, 1)
    new = {"ema_0.5": {name: torch.zeros(shape) for name, shape in SHAPES.items()}}
    new["weight"] = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    fill(newest_checkpoint(tmp_path), pieces(new, ()))
    assert torch.equal(new["ema_0.5"]["a"], content["weight"]["a"])


def test_a_rank_reads_its_share_and_nothing_else(tmp_path):
    shape = torch.Size((1 << 20,))
    state = {kind: torch.randn(shape) for kind in ("weight", "exp_avg", "ema_0.9")}
    halves = [(0, 1 << 19), (1 << 19, 1 << 20)]
    writers = [CheckpointWriter(tmp_path, rank, 2, Retention(1), background=bool(rank)) for rank in range(2)]
    writers[0].prepare(1)
    for writer, (start, stop) in zip(writers[::-1], halves[::-1], strict=True):
        piece = Piece("a", start, {kind: whole[start:stop] for kind, whole in state.items()})
        writer.save(1, [piece], {"a": shape}, {"position": 1, "optimizer_steps": 1})
        writer.wait()
    for ranks in (1, 2, 3, 4):
        for rank in range(ranks):
            start, stop = (rank * (1 << 20) // ranks, (rank + 1) * (1 << 20) // ranks)
            mine = {kind: torch.zeros(stop - start) for kind in state}
            read = fill(newest_checkpoint(tmp_path), [Piece("a", start, mine)])
            assert all(torch.equal(mine[kind], state[kind][start:stop]) for kind in state)
            chunks = 0 if ranks != 3 else 2 * 3 * CHUNK  # cuts inside a chunk
            assert read <= 3 * 4 * (stop - start) + chunks + 2 * 1024


def test_a_checkpoint_without_checksums_of_chunks_is_read_and_its_damage_found(tmp_path):
    content = weights(0)
    save(tmp_path, content, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["files"]["shard-00000.safetensors"]["crc32"]
    path.write_text(json.dumps({**manifest, "sha256": manifest_hash(manifest)}))
    assert torch.equal(dict(read_weights(newest_checkpoint(tmp_path), "weight"))["a"], content["weight"]["a"])
    shard = path.with_name("shard-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedError, match="content does not match its hash"):
        dict(read_weights(newest_checkpoint(tmp_path), "weight"))


def test_a_damaged_file_is_read_from_its_copy(tmp_path):
    content = weights(0)
    save(tmp_path / "here", content, 1)
    folder = tmp_path / "here" / "step-00000001"
    for file in folder.iterdir():
        remote.upload(file, f"memory://copies/{folder.name}/{file.name}")
    (folder / "uploaded").write_text(f"memory://copies/{folder.name}")
    for damage in (b"", (folder / "shard-00000.safetensors").read_bytes()[:-1] + b"!"):
        (folder / "shard-00000.safetensors").write_bytes(damage)
        checkpoint = newest_checkpoint(tmp_path / "here")
        verify(checkpoint)
        for kind in content:
            assert torch.equal(dict(read_weights(checkpoint, kind))["b"], content[kind]["b"])
    remote.remove(f"memory://copies/{folder.name}/shard-00000.safetensors")
    with pytest.raises(DamagedError, match=r"here.*hash; memory://copies.*: missing"):
        dict(read_weights(checkpoint, "ema_0.9"))


def test_another_model_or_kind_is_named(tmp_path):
    save(tmp_path, weights(0), 1)
    checkpoint = newest_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"a: \(3, 4\) in the checkpoint, \(4, 3\) in the config"):
        check_shapes(checkpoint, {**SHAPES, "a": torch.Size((4, 3))})
    with pytest.raises(CheckpointError, match=r"no ema_0\.5; it holds ema_0\.9, exp_avg, weight"):
        next(read_weights(checkpoint, "ema_0.5"))


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(2), [5, 6]),
        (Retention(1, every_steps=2), [2, 4, 6]),
        (Retention(1, best=True), [3, 6]),
    ],
)
def test_retention(tmp_path, retention, kept):
    losses = {1: 5.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: 2.0, 6: 6.0}
    for step, loss in losses.items():
        save(tmp_path, weights(step), step, loss=loss, retention=retention)
    assert sorted(int(path.name[5:]) for path in candidates(tmp_path)) == kept


def test_a_save_that_fails_is_given_up_and_the_one_before_stays(tmp_path):
    save(tmp_path, weights(0), 1)
    writers = [CheckpointWriter(tmp_path, rank, 2, Retention(1)) for rank in range(2)]
    writers[0].prepare(2)
    everything = list(pieces(weights(1), ()))
    writers[0].save(2, everything[:1], SHAPES, {"position": 16, "optimizer_steps": 2, "loss": 1.0})
    assert writers[0].busy  # rank 1 never writes its part
    writers[0].abandon(2)
    assert isinstance(writers[0].error, CheckpointError)
    assert newest_checkpoint(tmp_path).step == 1
    assert len(candidates(tmp_path)) == 1
