"""Training a network twice, plainly and on worker lanes, and comparing everything that a script can see."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pool
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mpsrun.run import report
from mpsrun.run.backend import mpsrun

Inputs = tuple[Any, ...]
# Sums over branches may be added in another order: nothing but the last bits of a double differs.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def on_lanes(model: nn.Module, workers: int, **options: Any) -> nn.Module:
    """Compile a module in place, every legal region forced into workers."""
    model.compile(backend=mpsrun, options={"lanes": "workers", "workers": workers}, **options)
    return model


@dataclass
class Trained:
    """A model under training, and what its last step showed."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, inputs: Inputs, seed: int) -> dict[str, Any]:
        """One training step; everything that can be seen of it, by name."""
        torch.manual_seed(seed)
        given = [_leaf(value) for value in inputs]
        self.optimizer.zero_grad()
        outputs = [value for value in tree_leaves(self.model(*given)) if isinstance(value, Tensor)]
        loss = loss_of(outputs)
        loss.backward()
        seen = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
        seen |= {f"gradient of input {i}": x.grad for i, x in enumerate(given) if isinstance(x, Tensor)}
        seen |= {f"gradient of {n}": _clone(p.grad) for n, p in self.model.named_parameters()}
        self.optimizer.step()
        seen |= {n: value.clone() for n, value in self.model.state_dict().items()}
        seen["random state"] = random_state(loss.device)
        return seen


def assert_transparent(
    make_model: Callable[[], nn.Module],
    make_inputs: Callable[[], Inputs],
    workers: int,
    regions: Sequence[int],
    *,
    steps: int = 4,
    used: int | None = None,
    forward_only: Sequence[int] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    tolerance: Mapping[str, float] | None = None,
) -> report.Graph:
    """Train both ways for some steps, with lanes forced; outputs, gradients, parameters, buffers must agree.

    regions: the number of branches of each region that is expected on lanes. used: how many workers each of them
    keeps busy, where it is not as many as there are or as the branches allow. Returns the graph's report.
    """
    torch.manual_seed(0)
    plain = trained(make_model().to(device, dtype))
    fast = trained(on_lanes(copy.deepcopy(plain.model), workers))
    report.graphs.clear()
    for step in range(steps):
        inputs = tuple(moved(value, device, dtype) for value in make_inputs())
        wanted, found = plain.step(inputs, step), fast.step(inputs, step)
        assert_same(found, wanted, f"step {step}", tolerance or TOLERANCE)
    (graph,) = report.graphs
    if not regions:
        assert (graph.regions, graph.calls) == ([], 0), graph
        return graph
    assert [len(region.lanes) for region in graph.regions] == list(regions), graph
    for region in graph.regions:
        most = len(region.lanes) - (0 in region.lanes) if used is None else used
        assert len({*region.lanes} - {0}) == min(workers, most), region
    assert graph.calls == steps - 1  # the first one looks
    assert_executed(graph, steps - 1, steps - 1, forward_only)
    return graph


def assert_executed(graph: report.Graph, forwards: int, backwards: int, forward_only: Sequence[int] = ()) -> None:
    """Each worker really ran each of its jobs so often: the workers are asked.

    forward_only: regions whose workers compute nothing that has a gradient.
    """
    coordinator = pool.current()
    assert coordinator is not None
    counts = coordinator.counts()
    for index, region in enumerate(graph.regions):
        for worker, job in ((w, j) for w, j in zip(region.lanes, region.jobs, strict=True) if w > 0):
            found = counts[worker].forwards.get(job, 0), counts[worker].backwards.get(job, 0)
            assert found == (forwards, 0 if index in forward_only else backwards), (index, worker, job)


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any], when: str, tolerance: Mapping[str, float]) -> None:
    """Same names, values, strides and gaps."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        where = f"{when}, {name}"
        if value is None:
            assert found[name] is None, f"{where}: expected no value"
            continue
        if not isinstance(value, Tensor):
            assert found[name] == value, f"{where}: {found[name]} for {value}"
            continue
        assert found[name] is not None, f"{where}: expected a value"
        torch.testing.assert_close(
            found[name],
            value,
            check_stride=True,
            msg=lambda text, where=where: f"{where}: {text}",
            **tolerance,
        )


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """A loss in which every element of every output has a weight of its own."""
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        if output.requires_grad:
            weights = torch.arange(1, output.numel() + 1, device=output.device).cos().view(output.shape)
            total = total + (output * weights.to(output.dtype)).sum() + output.square().mean()
    return total


def trained(model: nn.Module) -> Trained:
    """A model with an optimizer that keeps state."""
    parameters = [p for p in model.parameters() if p.requires_grad] or [torch.zeros(1)]
    return Trained(model, torch.optim.SGD(parameters, lr=0.02, momentum=0.9))


def random_state(device: torch.device) -> Tensor:
    """Where the random generators of a device stand."""
    return torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.clone().requires_grad_(value.is_floating_point())


def moved(value: Any, device: str, dtype: torch.dtype) -> Any:
    """An input on a device, floating ones in this dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _clone(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()
