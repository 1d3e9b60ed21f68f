"""A second copy of a network's modules around the same weights: for a second thread, or to be changed."""

from __future__ import annotations

import copy

from torch import Tensor

from bbx.backbone import Backbone


def replica(backbone: Backbone) -> Backbone:
    """The same backbone with modules of its own, so that two threads can run it at once; parameters are shared."""
    network = backbone.network
    shared: list[Tensor] = [*network.parameters(), *network.buffers()]
    # The provider's way to the maps holds the network, too: both are copied as one.
    made, forward = copy.deepcopy((network, backbone.forward), {id(tensor): tensor for tensor in shared})
    return backbone.around(made, forward)
