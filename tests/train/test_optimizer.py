"""Which parameters learn at which rate, and a step that can be called off leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cellplane.train.config import OptimizerConfig
from cellplane.train.optimizer import MOMENTS, AskingAdamW, begin_moments, parameter_groups, set_lr, trainable


class Network(nn.Module):
    """An embedder and a rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedder(x))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def learn(network: Network, optimizer: AskingAdamW, seed: int = 0) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    network(x).square().sum().backward()
    optimizer.step()


def weights(network: Network) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def test_the_embedder_learns_at_its_own_rate(network):
    config = OptimizerConfig(lr=1e-2, embedder_lr_scale=0.1)
    rest, embedder = parameter_groups(network, config)
    assert {id(parameter) for parameter in embedder["params"]} == {id(parameter) for parameter in network.embedder.parameters()}
    assert {id(parameter) for parameter in rest["params"]} == {id(parameter) for parameter in network.head.parameters()}
    optimizer, before = AskingAdamW(network, config), weights(network)
    set_lr(optimizer.param_groups, 3e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3e-3, 3e-4])
    learn(network, optimizer)
    moved = [float((new - old).abs().max()) for new, old in zip(weights(network), before, strict=True)]
    assert moved == pytest.approx([3e-4, 3e-4, 3e-3, 3e-3], rel=0.05)  # the first step of Adam moves what has a gradient by its rate


def test_one_rate_makes_one_group_and_frozen_parameters_belong_to_none(network):
    assert len(parameter_groups(network, OptimizerConfig())) == 1
    network.embedder.requires_grad_(False)
    groups = parameter_groups(network, OptimizerConfig(embedder_lr_scale=0.1))
    assert [len(group["params"]) for group in groups] == [2]
    assert [name for name, _ in trainable(network)] == ["head.weight", "head.bias"]
    before = weights(network)
    learn(network, AskingAdamW(network, OptimizerConfig()))
    assert [torch.equal(new, old) for new, old in zip(weights(network), before, strict=True)] == [True, True, False, False]


def test_a_step_that_is_called_off_changes_neither_weights_nor_moments_nor_counters(network):
    willing = True
    optimizer = AskingAdamW(network, OptimizerConfig(), lambda: willing)
    learn(network, optimizer)
    before, slots = weights(network), [{name: value.clone() for name, value in slot.items()} for slot in optimizer.state.values()]
    willing = False
    learn(network, optimizer, seed=1)
    assert all(torch.equal(new, old) for new, old in zip(weights(network), before, strict=True))
    for now, then in zip(optimizer.state.values(), slots, strict=True):
        assert all(torch.equal(now[name], then[name]) for name in ("step", *MOMENTS))
    willing = True
    learn(network, optimizer, seed=1)
    assert not any(torch.equal(new, old) for new, old in zip(weights(network), before, strict=True))


def test_moments_begun_by_hand_are_those_the_optimizer_would_have_made(network):
    by_itself, begun = network, Network()
    begun.load_state_dict(by_itself.state_dict())
    optimizers = [AskingAdamW(one, OptimizerConfig(lr=0.1)) for one in (by_itself, begun)]
    begin_moments(optimizers[1], begun.parameters(), 0)
    for seed in range(3):
        for one, optimizer in zip((by_itself, begun), optimizers, strict=True):
            learn(one, optimizer, seed)
    assert all(torch.equal(one, other) for one, other in zip(weights(by_itself), weights(begun), strict=True))


def test_the_number_of_updates_is_what_the_bias_correction_counts(network):
    optimizer = AskingAdamW(network, OptimizerConfig())
    begin_moments(optimizer, network.parameters(), 7)
    learn(network, optimizer)
    assert {float(slot["step"]) for slot in optimizer.state.values()} == {8.0}


def test_a_parameters_own_scale_multiplies_and_the_plain_case_stays_as_it_was(network):
    """Fine-tuning gives blocks their share; pre-training's one or two groups keep their order, or its checkpoints would not fit."""
    config = OptimizerConfig(lr=1e-2, embedder_lr_scale=0.1)
    plain = parameter_groups(network, config)
    assert [(group["scale"], len(group["params"])) for group in plain] == [(1.0, 2), (0.1, 2)]
    for parameter in network.parameters():
        parameter.lr_scale = 1.0
    again = parameter_groups(network, config)
    assert [[id(one) for one in group["params"]] for group in again] == [[id(one) for one in group["params"]] for group in plain]
    network.head.weight.lr_scale = 0.5
    network.embedder.weight.lr_scale = 0.5
    scaled = parameter_groups(network, config)
    assert [group["scale"] for group in scaled] == [0.5, 1.0, 0.05, 0.1]
    assert [id(group["params"][0]) for group in scaled] == [
        id(one) for one in (network.head.weight, network.head.bias, network.embedder.weight, network.embedder.bias)
    ]
