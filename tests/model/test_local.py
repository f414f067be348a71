"""Attention to neighbours in the tissue: only distances matter, nobody sees another sentence, and a new block does nothing."""

# C cells, D width

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cellplane.cells import CellBatch
from cellplane.model import local
from cellplane.model.cellplm import CellPLM, new_model
from cellplane.model.local import LocalBlock, Neighbours, neighbours
from cellplane.model.noise import Noise
from tests.model.test_invariants import masked
from tests.tiny import TINY, random_batch

LOCAL = replace(TINY, local_blocks=2, local_neighbours=3)


def opened(config: object = LOCAL) -> CellPLM:
    """A network whose local blocks have learned to let something through and to look at distances."""
    network = new_model(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("gate_D", "distance_HR")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return network


def placed(xy: list[list[float]], sizes: list[int] | None = None) -> CellBatch:
    """Cells at these coordinates, in micrometres."""
    batch = random_batch(sizes or [len(xy)])
    return replace(batch, coordinates=torch.tensor(xy))


def slide(n_cells: int = 40, sizes: list[int] | None = None) -> CellBatch:
    """Cells scattered over 200 x 200 um, the third without coordinates."""
    batch = random_batch(sizes or [n_cells], seed=4)
    return replace(batch, coordinates=batch.coordinates * 0.4)


def moved(batch: CellBatch, change: Callable[[Tensor], Tensor]) -> CellBatch:
    return replace(batch, coordinates=change(batch.coordinates))


def turned(xy: Tensor) -> Tensor:
    angle = 0.7
    return xy @ torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


RIGID = {
    "moved": lambda xy: xy + torch.tensor([3000.0, -800.0]),
    "turned": turned,
    "mirrored": lambda xy: xy * torch.tensor([-1.0, 1.0]),
    "axes swapped": lambda xy: xy.flip(1),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RIGID)
def test_moving_turning_or_mirroring_a_slide_changes_nothing(name):
    model, batch = opened(), slide()
    torch.testing.assert_close(model(moved(batch, RIGID[name])).latent, model(batch).latent, rtol=1e-4, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", RIGID)
@pytest.mark.parametrize("k", [1, 3, 4, 6, 16])
def test_nor_does_it_on_a_regular_grid_where_many_cells_are_equally_far(name, k):
    model, batch = opened(replace(LOCAL, local_neighbours=k)), random_batch([49])
    batch = replace(batch, coordinates=torch.cartesian_prod(torch.arange(7.0), torch.arange(7.0)) * 55)
    torch.testing.assert_close(model(moved(batch, RIGID[name])).latent, model(batch).latent, rtol=1e-4, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("grid", [False, True], ids=["scattered", "equally far"])
def test_permuting_the_cells_permutes_the_answers(grid):
    model, batch = opened(), slide(36)
    if grid:
        batch = replace(batch, coordinates=torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)) * 10)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(batch.take(order)).latent, model(batch).latent[order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 64, 1 << 22])
def test_a_sentence_packed_with_others_answers_as_it_does_alone(monkeypatch, piece):
    monkeypatch.setattr(local, "PAIRS_AT_ONCE", piece)
    monkeypatch.setattr(local, "VALUES_AT_ONCE", piece)
    model, batch = opened(), slide(sizes=[5, 1, 0, 2, 17])
    packed = model(batch).latent
    for (start, end), part in zip(batch.spans(), batch.sentences(), strict=True):
        torch.testing.assert_close(packed[start:end], model(part).latent, rtol=0, atol=1e-6)


@torch.no_grad()
def test_no_sentence_sees_another_though_their_cells_lie_side_by_side():
    model, batch = opened(), slide(sizes=[12, 12])
    batch = replace(batch, coordinates=batch.coordinates[:12].repeat(2, 1))
    changed = replace(batch, value=torch.where(batch.cell_of_entry() >= 12, batch.value * 3 + 1, batch.value))
    changed = moved(changed, lambda xy: torch.cat([xy[:12], xy[12:] * 2]))
    before, after = model(batch).latent, model(changed).latent
    assert torch.equal(before[:12], after[:12])
    assert not torch.isclose(before[12:], after[12:]).all(1).any()


@torch.no_grad()
def test_a_cell_is_moved_by_its_neighbours_and_not_by_cells_farther_away():
    batch = placed([[0.0, 0.0], [10.0, 0.0], [0.0, 11.0], [300.0, 0.0], [310.0, 0.0], [300.0, 15.0]])
    block = opened(replace(LOCAL, local_neighbours=2)).encoder.local[0]
    near = neighbours(batch, replace(LOCAL, local_neighbours=2))
    h = torch.randn(6, TINY.width, generator=torch.Generator().manual_seed(0))
    for other, seen in ((1, True), (2, True), (3, False), (5, False)):
        changed = h.index_fill(0, torch.tensor([other]), 0.5)
        assert bool((block(changed, near, None)[0] != block(h, near, None)[0]).any()) == seen


@torch.no_grad()
def test_a_new_block_changes_nothing_and_an_opened_one_makes_coordinates_matter():
    batch = slide()
    plain, new, trained = new_model(TINY, 1), new_model(LOCAL, 1), opened()
    state = plain.state_dict()
    new.load_state_dict({**new.state_dict(), **state})
    assert torch.equal(new(batch).latent, plain(batch).latent)
    assert torch.equal(new(batch).latent, new(moved(batch, lambda xy: xy * 2)).latent)
    assert not torch.equal(trained(batch).latent, trained(moved(batch, lambda xy: xy * 2)).latent)


@torch.no_grad()
def test_cells_without_coordinates_see_nobody_are_seen_by_nobody_and_pass_unchanged():
    block, batch = opened().encoder.local[0], slide()
    batch = moved(batch, lambda xy: torch.where(torch.arange(40)[:, None] == 7, torch.tensor([1.0, torch.nan]), xy))
    h = torch.randn(40, TINY.width, generator=torch.Generator().manual_seed(0))
    near = neighbours(batch, LOCAL)
    out = block(h, near, None)
    assert near.located.logical_not().nonzero()[:, 0].tolist() == [2, 7]
    assert torch.equal(out[[2, 7]], h[[2, 7]])
    assert not torch.isclose(out, h).all(1)[near.located].any()
    changed = h.clone()
    changed[[2, 7]] += 1
    others = torch.tensor([cell for cell in range(40) if cell not in (2, 7)])
    torch.testing.assert_close(block(changed, near, None)[others], out[others], rtol=0, atol=1e-6)


@torch.no_grad()
def test_without_any_coordinates_the_blocks_do_nothing():
    batch = moved(slide(), lambda xy: xy * torch.nan)
    model = opened()
    plain = new_model(TINY, 1)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".local." not in name})
    assert torch.equal(model(batch).latent, plain(batch).latent)


def test_neighbours_are_the_nearest_and_fade_towards_the_first_that_is_left_out():
    batch = placed([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, -10.0], [60.0, 0.0]])
    near = neighbours(batch, replace(LOCAL, local_neighbours=2))
    assert near.index[0].tolist() == [0, 1, 2]
    torch.testing.assert_close(near.distance_um[0], torch.tensor([0.0, 3.0, 4.0]))
    torch.testing.assert_close(near.weight[0], torch.tensor([1.0, 1 - 9 / 100, 1 - 16 / 100]))


def test_a_radius_leaves_out_whoever_is_farther():
    batch = placed([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.0, -10.0], [60.0, 0.0]])
    near = neighbours(batch, replace(LOCAL, local_neighbours=4, local_radius_um=5.0))
    torch.testing.assert_close(near.weight[0], torch.tensor([1.0, 1 - 9 / 25, 1 - 16 / 25, 0.0, 0.0]))
    assert near.weight[4].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_in_a_small_sentence_all_others_are_neighbours_and_empty_places_weigh_nothing():
    near = neighbours(placed([[0.0, 0.0], [50.0, 0.0]]), LOCAL)
    assert near.index.tolist() == [[0, 1, 0, 0], [1, 0, 1, 1]]
    assert near.weight.tolist() == [[1.0, 1.0, 0.0, 0.0]] * 2


@torch.no_grad()
def test_cells_at_one_place_are_handled_and_too_many_of_them_prefer_nobody():
    few, many = placed([[5.0, 5.0]] * 3), placed([[5.0, 5.0]] * 9)
    assert neighbours(few, LOCAL).weight[:, 1:3].eq(1).all()
    assert neighbours(many, LOCAL).weight[:, 1:].eq(0).all()
    for batch in (few, many):
        order = torch.arange(batch.n_cells).flip(0)
        latent = opened()(batch).latent
        assert bool(latent.isfinite().all())
        torch.testing.assert_close(opened()(batch.take(order)).latent, latent[order], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("far", [1e6, 1e30])
def test_coordinates_of_any_size_give_finite_answers(far):
    assert bool(opened()(moved(slide(), lambda xy: xy * far)).latent.isfinite().all())


@pytest.mark.parametrize("sizes", [[], [0], [1], [2, 0, 1]], ids=str)
def test_sentences_of_no_or_one_cell_are_no_trouble(sizes):
    network, batch = opened(), random_batch(sizes)
    loss = network(batch, masked(batch), Noise(0)).loss.total
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.encoder.local.parameters())


@pytest.mark.parametrize("open_gates", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_trainable_is_without_gradient(open_gates, recompute):
    config = replace(LOCAL, recompute=recompute)
    network, batch = (opened if open_gates else lambda config: new_model(config, 1))(config), slide(sizes=[9, 7])
    network(batch, masked(batch), Noise(0)).loss.total.sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
    gradients = {name: float(parameter.grad.abs().sum()) for name, parameter in network.encoder.local.named_parameters()}
    assert all(gradients[f"{block}.gate_D"] > 0 for block in range(2))
    if open_gates:  # softmax does not see a bias that all keys share
        assert not [name for name, size in gradients.items() if size == 0 and not name.endswith("key.bias")]


def test_gradients_do_not_depend_on_how_many_cells_are_gathered_at_a_time(monkeypatch):
    batch, found = slide(sizes=[9, 14]), []
    for values in (1, 200, 1 << 23):
        monkeypatch.setattr(local, "VALUES_AT_ONCE", values)
        network = opened()
        network(batch, masked(batch), Noise(0)).loss.total.sum().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_the_pairs_of_cells_is_kept(monkeypatch):
    monkeypatch.setattr(local, "PAIRS_AT_ONCE", 200)
    monkeypatch.setattr(local, "VALUES_AT_ONCE", 200)
    batch, kept = slide(200), []
    network = opened().encoder.local[0]
    h = torch.randn(200, TINY.width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.numel()), tensor)[1], lambda tensor: tensor):
        network(h, neighbours(batch, LOCAL), None).sum()
    assert max(kept) <= 200 * TINY.width * 2


def test_in_bfloat16_answers_and_gradients_stay_close():
    batch, found = slide(sizes=[9, 14]), []
    for precision in ("float32", "bfloat16"):
        network = opened(replace(LOCAL, precision=precision, latent="ae", width=64, decoder_width=64))  # norms over 16 channels, not 4
        output = network(batch, masked(batch), Noise(0))
        output.loss.total.sum().backward()
        local_gradients = torch.cat([parameter.grad.flatten() for parameter in network.encoder.local.parameters()])
        found.append((output.latent.detach(), local_gradients))
    for exact, rough in zip(*found, strict=True):
        assert float(torch.cosine_similarity(exact.flatten(), rough.float().flatten(), dim=0)) > 0.99


def test_all_gradients_are_those_of_plain_autograd(monkeypatch):
    monkeypatch.setattr(local, "VALUES_AT_ONCE", 3 * 4 * TINY.width)
    near = neighbours(slide(12), LOCAL)
    generator, found = torch.Generator().manual_seed(0), []
    q, k, v = torch.randn(3, 12, TINY.width, generator=generator)
    distance, pull = torch.randn(2, 8, generator=generator), torch.randn(12, TINY.width, generator=generator)
    for attend in (local._Attend.apply, plain_attention):
        given = [tensor.clone().requires_grad_() for tensor in (q, k, v, distance)]
        out = attend(*given, near)
        (out * pull).sum().backward()
        found.append([out, *(tensor.grad for tensor in given)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, distance: Tensor, near: Neighbours) -> Tensor:
    """All cells at once."""
    q, k, v = (tensor.view(len(tensor), 2, -1) for tensor in (q, k, v))
    functions = torch.exp(-0.5 * (near.distance_um[..., None] / torch.tensor(local.LENGTHS_UM)) ** 2)
    logits = (q[:, None] * k[near.index]).sum(-1) / q.shape[2] ** 0.5 + functions @ distance.T + near.weight.log()[..., None]
    return (logits.softmax(1)[..., None] * v[near.index]).sum(1).flatten(1)


@torch.no_grad()
def test_attention_is_the_softmax_over_neighbours_with_the_learned_bias():
    block: LocalBlock = opened().encoder.local[0]
    batch = slide(12)
    near: Neighbours = neighbours(batch, LOCAL)
    a = torch.randn(12, TINY.width, generator=torch.Generator().manual_seed(0))
    q, k, v = (layer(a).unflatten(1, (TINY.n_heads, -1)) for layer in (block.query, block.key, block.value))
    expected = torch.zeros_like(q)
    for cell in range(12):
        for head in range(TINY.n_heads):
            distance = near.distance_um[cell][:, None] / torch.tensor(local.LENGTHS_UM)
            bias = torch.exp(-0.5 * distance**2) @ block.distance_HR[head]
            score = k[near.index[cell], head] @ q[cell, head] / q.shape[2] ** 0.5 + bias
            share = near.weight[cell] * torch.exp(score)
            expected[cell, head] = (share / share.sum()) @ v[near.index[cell], head]
    torch.testing.assert_close(block.attention(a, near), expected.flatten(1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hidden_values_cannot_pass_through_a_neighbour():
    model, batch = opened(), slide(20)
    mask = masked(batch)
    changed = replace(batch, value=torch.where(mask.entry, batch.value + 7, batch.value))
    assert torch.equal(model(changed, mask).latent, model(batch, mask).latent)


@pytest.mark.parametrize(
    "changes", [{"local_blocks": -1}, {"local_neighbours": 0}, {"local_radius_um": -1.0}, {"local_radius_um": math.nan}], ids=str
)
def test_numbers_that_make_no_neighbourhood_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(LOCAL, **changes)
