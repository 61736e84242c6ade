"""Controls: tickets that share one property with a found one and nothing else.

A shuffled mask keeps the density of each layer; fresh weights keep the mask; fresh magnitudes keep mask and signs. All of
them leave what is not prunable (biases, norms, running statistics) as the ticket has it.
"""
from __future__ import annotations

import torch

from dpkit.prune import masks
from dpkit.prune.iterate import Ticket
from dpkit.tree import Mask, Params


def shuffle_mask(mask: Mask, generator: torch.Generator) -> Mask:
    """A mask with as many survivors in each tensor, at uniformly random places. generator: on the CPU, one draw a tensor."""
    found = {}
    for name, m in mask.items():
        order = torch.randperm(m.numel(), generator=generator).to(m.device)
        found[name] = m.reshape(-1)[order].reshape(m.shape)
    return found


def shuffled(ticket: Ticket, start_params: Params, generator: torch.Generator) -> Ticket:
    """The ticket with its mask shuffled within each tensor (Frankle et al. 2021, arXiv 2009.08576).

    start_params: the parameters that the ticket's survivors were rewound to; the weights at the new places come from there,
    as the ticket itself holds zeros where it was pruned. Raises ``ValueError`` where they do not fit the mask.
    """
    return _with_weights(ticket, start_params, shuffle_mask(ticket.mask, generator))


def reinit(ticket: Ticket, fresh_params: Params) -> Ticket:
    """The ticket's mask on freshly drawn weights (Frankle and Carbin 2019, arXiv 1803.03635, "random reinitialization").

    fresh_params: of another initialisation; only its prunable weights are taken. Raises ``ValueError`` where they do not fit.
    """
    return _with_weights(ticket, fresh_params, ticket.mask)


def signs(ticket: Ticket, fresh_params: Params) -> Ticket:
    """Freshly drawn magnitudes with the signs at which the ticket starts (Zhou et al. 2019, arXiv 1905.01067).

    fresh_params: of another initialisation; only the magnitudes of its prunable weights are taken. Raises ``ValueError`` where
    they do not fit.
    """
    masks.check(ticket.mask, fresh_params)
    signed = {name: torch.copysign(fresh_params[name], ticket.params[name]) for name in ticket.mask}
    return _with_weights(ticket, signed, ticket.mask)


def _with_weights(ticket: Ticket, weights: Params, mask: Mask) -> Ticket:
    """The ``ticket`` with prunable ``weights`` under ``mask``."""
    masks.check(mask, weights)
    params = {name: weights[name] if name in mask else t for name, t in ticket.params.items()}
    return Ticket(masks.apply(params, mask), dict(ticket.buffers), mask, ticket.round)
