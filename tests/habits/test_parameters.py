"""Parameters that are replaced, changed, shared or saved by the script."""

import io

import pytest
import torch
from alike import FIRST, LAST, Seen, parameter, same, state, sum_of, train, x
from networks import Three
from torch import nn
from transparency import on_lanes

pytestmark = pytest.mark.usefixtures("workers")


@pytest.mark.parametrize("name", ["paths.0.3.weight", "paths.2.3.weight", "trunk.weight"])
def test_weight_changed_before_backward(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        given = x().requires_grad_()
        loss = sum_of(model(given))
        with torch.no_grad():
            parameter(model, name).mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        model.zero_grad()
        return {"losses": torch.stack(train(model, 3)), **state(model)}

    same(script)


def test_state_dict_as_before() -> None:
    """Names, aliases and the size on disk stay what they were when the parameters are shared with the workers."""

    class Tied(Three):
        def __init__(self) -> None:
            super().__init__()
            self.paths[1][3].weight = self.paths[2][3].weight
            flat = torch.randn(60)
            self.paths[1][0].weight.data = flat[:48].view(8, 6)
            self.paths[1][0].bias.data = flat[48:56]

    model = Tied()
    size = len(saved(model))
    on_lanes(model, 2)
    names = list(model.state_dict())
    for _ in range(3):
        model(x().float()).sum().backward()
    assert list(model.state_dict()) == names
    assert len(saved(model)) == size
    assert model.paths[1][3].weight.data_ptr() == model.paths[2][3].weight.data_ptr()
    weight, bias = model.paths[1][0].weight, model.paths[1][0].bias
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()
    restored = torch.load(io.BytesIO(saved(model)))
    for name, value in model.state_dict().items():
        assert torch.equal(restored[name], value)


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getvalue()


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_data_replaced(name: str, nothing_kept: None) -> None:
    def script(model: nn.Module) -> Seen:
        losses = train(model, 2)
        parameter(model, name).data = torch.full((8, 6), 0.25, dtype=torch.float64)
        losses += train(model, 3)
        model.load_state_dict({n: value * 0.5 for n, value in model.state_dict().items()})
        losses += train(model, 3)
        model.load_state_dict({n: value * 0.5 for n, value in model.state_dict().items()}, assign=True)
        return {"losses": torch.stack(losses + train(model, 3)), **state(model)}

    same(script, calls=10)
