"""Set-ups with several models or several forwards before a backward: adversarial, siamese, contrastive, distilled."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from alike import EPS, Seen, same, state, sum_of, x
from networks import Three
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("workers", "nothing_kept")


def sgd(model: nn.Module, part: str, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.get_submodule(part).parameters(), lr=lr, momentum=0.5)


class Adversaries(nn.Module):
    """A generator and its critic, which are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = Three(), Three()
        self.generator.head = nn.Linear(12, 6)


def slopes(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The gradient penalty of a Wasserstein critic."""
    between = (0.3 * real + 0.7 * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return slope.norm(dim=1).sub(1).square().mean()


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_adversaries(penalty: float) -> None:
    def script(model: nn.Module) -> Seen:
        generator, critic = model.get_submodule("generator"), model.get_submodule("critic")
        of_generator, of_critic = sgd(model, "generator"), sgd(model, "critic")
        seen: Seen = {}
        for i in range(3):
            real, noise = x(i), x(100 + i)
            of_critic.zero_grad()
            fake = generator(noise)
            loss = F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(real)).mean()
            if penalty:
                loss = loss + penalty * slopes(critic, real, fake)
            loss.backward()
            of_critic.step()
            of_generator.zero_grad()
            against = F.softplus(-critic(fake)).mean()
            against.backward()
            of_generator.step()
            seen |= {f"critic {i}": loss.detach(), f"generator {i}": against.detach()}
        return {**seen, **state(model)}

    same(script, make=Adversaries, calls=22, parts=("generator", "critic"))


def test_critic_changed_between_its_forward_and_backward() -> None:
    """The classic mistake of a training loop with two optimizers raises as in plain PyTorch."""

    def script(model: nn.Module) -> Seen:
        generator, critic = model.get_submodule("generator"), model.get_submodule("critic")
        of_critic = sgd(model, "critic")
        judged = critic(generator(x(1)))
        judged.detach_().requires_grad_()
        judged = critic(generator(x(1)))
        sum_of(critic(x(2))).backward()
        of_critic.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            sum_of(judged).backward()
        return state(critic)

    same(script, make=Adversaries, calls=6, parts=("generator", "critic"))


def test_siamese() -> None:
    def script(model: nn.Module) -> Seen:
        optimizer = sgd(model, "")
        losses = []
        for i in range(4):
            optimizer.zero_grad()
            anchor, near, far = (model(x(10 * i + k, rows=4)) for k in range(3))
            losses.append(F.triplet_margin_loss(anchor, near, far, margin=3.0))
            losses[-1].backward()
            optimizer.step()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, calls=20)


class Contrast(nn.Module):
    """Two encoders and a temperature, which the script calls one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = Three(), Three(5)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))


def test_contrastive() -> None:
    def script(model: nn.Module) -> Seen:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=EPS)
        losses = []
        for i in range(4):
            optimizer.zero_grad()
            images = F.normalize(model.get_submodule("images")(x(i)), dim=1)
            texts = F.normalize(model.get_submodule("texts")(x(50 + i)), dim=1)
            logits = model.get_parameter("scale").exp() * images @ texts.t()
            labels = torch.arange(len(logits), device=logits.device)
            losses.append((F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2)
            losses[-1].backward()
            optimizer.step()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, make=Contrast, calls=14, parts=("images", "texts"))


class Pair(nn.Module):
    """A student, and a teacher which follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Three()
        self.teacher = copy.deepcopy(self.student)


def test_momentum_teacher() -> None:
    """The teacher's weights are a moving average, written in place, of the student's."""

    def script(model: nn.Module) -> Seen:
        student, teacher = model.get_submodule("student"), model.get_submodule("teacher")
        teacher.requires_grad_(False)
        optimizer = sgd(model, "student")
        losses = []
        for i in range(5):
            optimizer.zero_grad()
            with torch.no_grad():
                target = teacher(x(i))
            losses.append(F.mse_loss(student(x(i) + 0.1), target) + 0.1 * sum_of(student(x(i))))
            losses[-1].backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
                for slow, fast in zip(teacher.buffers(), student.buffers(), strict=True):
                    slow.copy_(fast)
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, make=Pair, calls=20, parts=("student", "teacher"))


def test_distillation() -> None:
    def script(model: nn.Module) -> Seen:
        student, teacher = model.get_submodule("student"), model.get_submodule("teacher").eval()
        optimizer = sgd(model, "student")
        losses = []
        for i in range(4):
            optimizer.zero_grad()
            with torch.inference_mode():
                target = teacher(x(i)).softmax(1)
            output = student(x(i)).log_softmax(1)
            losses.append(F.kl_div(output, target.clone(), reduction="batchmean"))
            losses[-1].backward()
            optimizer.step()
        return {"losses": torch.stack(losses).detach(), **state(model)}

    same(script, make=Pair, calls=8, parts=("student", "teacher"))
