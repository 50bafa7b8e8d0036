"""gptkit/training/loss.py: against a calculation by hand and torch's cross_entropy and kl_div of full logits in float64."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_model import GPTConfig, GPTModel
from gptkit.training import loss
from gptkit.training.loss import SoftTargets, linear_cross_entropy

N, C, V = 200, 24, 300  # V rows of the head, of which the last ones may be padding


def random_case(
    vocab_size: int = V, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states (4, N / 4, C), weight (V, C) and targets below vocab_size (4, N / 4).

    The logits have a standard deviation of about 5.
    """
    draw = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(4, N // 4, C, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=draw).to(dtype).requires_grad_()
    return hidden_states, weight, torch.randint(vocab_size, (4, N // 4), generator=draw)


def reference(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int = V
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss and both gradients in float64, with a head that has no padding."""
    hidden_states, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight))
    loss = F.cross_entropy((hidden_states @ weight[:vocab_size].T).flatten(0, 1), targets.flatten())
    return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))


TEACHER_C, TEACHER_V = 16, V + 20


def random_teacher(share: float = 0.3, vocab_size: int = V, dtype: torch.dtype = torch.float32) -> SoftTargets:
    """Return what a narrower teacher with more padding predicts; the padding must have no effect."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, N // 4, TEACHER_C, generator=draw).to(dtype)
    weight = torch.randn(TEACHER_V, TEACHER_C, generator=draw).to(dtype)
    weight[vocab_size:] = 100.0
    return SoftTargets(hidden, weight, share)


def reference_with_teacher(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, teacher: SoftTargets, vocab_size: int = V
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mixture and both gradients as `reference` does."""
    hidden_states, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden_states, weight))
    logits = (hidden_states @ weight[:vocab_size].T).flatten(0, 1)
    soft = (teacher.hidden.double() @ teacher.weight[:vocab_size].double().T).flatten(0, 1)
    divergence = F.kl_div(logits.log_softmax(-1), soft.softmax(-1), reduction="batchmean")
    loss = (1 - teacher.share) * F.cross_entropy(logits, targets.flatten()) + teacher.share * divergence
    return loss.detach(), *torch.autograd.grad(loss, (hidden_states, weight))


def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Assert that the largest difference is at most `tolerance` times the largest value."""
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def set_chunk_rows(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a chunk of logits have that many rows."""
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", n_rows * V * 4)


class Watch(TorchDispatchMode):
    """Counts matrix products, and the entries of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.n_products = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.n_products += "mm" in func.__name__
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_by_hand() -> None:
    """Probabilities 1/4, 3/4 of the first token and 1/2, 1/2 of the second."""
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    loss = linear_cross_entropy(torch.eye(2)[None], weight, torch.tensor([[1, 0]]), 2)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert loss.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [V, V - 1, V - 44])
@pytest.mark.parametrize("n_rows", [1, 67, 100, 199, 200, 1000])  # a chunk has at least 64
def test_value_and_gradients_in_chunks(n_rows: int, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(n_rows, monkeypatch)
    hidden_states, weight, targets = random_case(vocab_size)
    weight.data[vocab_size:] = 100.0  # padding must have no effect
    loss = linear_cross_entropy(hidden_states, weight, targets, vocab_size)
    loss.backward()
    expected = reference(hidden_states, weight, targets, vocab_size)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_near(hidden_states.grad, expected[1], 1e-5)
    assert_near(weight.grad, expected[2], 1e-5)
    assert not weight.grad[vocab_size:].any()


def test_float64_hidden_states_keep_their_type() -> None:
    hidden_states, weight, targets = random_case(dtype=torch.float64)
    loss = linear_cross_entropy(hidden_states, weight, targets, V)
    loss.backward()
    assert (loss.dtype, hidden_states.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float64, torch.float64)
    expected = reference(hidden_states, weight, targets)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_near(hidden_states.grad, expected[1], 1e-5)
    assert_near(weight.grad, expected[2], 1e-5)


@pytest.mark.parametrize("target", [0, V - 45])
def test_first_and_last_token(target: int) -> None:
    hidden_states, weight, targets = random_case()
    targets.fill_(target)
    loss = linear_cross_entropy(hidden_states, weight, targets, V - 44)
    loss.backward()
    expected = reference(hidden_states, weight, targets, V - 44)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_near(weight.grad, expected[2], 1e-5)


def test_a_padding_token_is_impossible() -> None:
    hidden_states, weight, targets = random_case()
    targets[2, 3] = V - 44
    assert linear_cross_entropy(hidden_states, weight, targets, V - 44).item() == math.inf


def test_logits_far_from_zero() -> None:
    hidden_states, weight, targets = random_case()
    hidden_states.data *= 200  # e^1000 is no float32
    loss = linear_cross_entropy(hidden_states, weight, targets, V)
    loss.backward()
    expected = reference(hidden_states, weight, targets)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert_near(weight.grad, expected[2], 1e-3)


def test_a_share_of_the_loss_has_that_share_of_the_gradient() -> None:
    """Gradient accumulation needs that: here two thirds, in two micro-steps."""
    hidden_states, weight, targets = random_case()
    for _ in range(2):
        (linear_cross_entropy(hidden_states, weight, targets, V) / 3).backward()
    expected = reference(hidden_states, weight, targets)
    assert_near(hidden_states.grad, expected[1] * 2 / 3, 1e-5)
    assert_near(weight.grad, expected[2] * 2 / 3, 1e-5)


@pytest.mark.parametrize("n_rows", [67, 1000])
def test_bfloat16_products(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(n_rows, monkeypatch)
    hidden_states, weight, targets = random_case(V - 44)
    exact = linear_cross_entropy(hidden_states, weight, targets, V - 44).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden_states, weight, targets, V - 44)
    loss.backward()
    assert (loss.dtype, hidden_states.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    expected = reference(hidden_states, weight, targets, V - 44)
    assert 1e-5 < abs(loss.item() - exact) < 2e-2  # of about 14
    assert_near(hidden_states.grad, expected[1], 0.03)
    assert_near(weight.grad, expected[2], 0.03)
    assert not weight.grad[V - 44 :].any()


def test_probabilities_are_float32_where_products_are_bfloat16() -> None:
    """All tokens have the same logits, exact ones, so that no error averages out."""
    hidden_states, weight, targets = random_case()
    hidden_states.data[:] = torch.eye(C)[0]
    targets.fill_(7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden_states, 3 * weight, targets, V)
    expected = F.cross_entropy((3 * weight[:, :1]).T.bfloat16().double(), targets[0, :1])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_gradient_of_many_rows_stays_within_float16() -> None:
    """The head's gradient is their sum: without a limit of rows it would be 160,000 times a share here."""
    weight = torch.zeros(64, 4, requires_grad=True)
    hidden_states, targets = torch.full((2**15, 4), 5.0), torch.full((2**15,), 7)
    with torch.autocast("cpu", torch.float16), pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_ROWS, "cpu", 2**15)  # as on CUDA, where memory is the only limit
        linear_cross_entropy(hidden_states, weight, targets, 64).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[7], torch.full((4,), -5 * 63 / 64), rtol=1e-2, atol=0)
    torch.testing.assert_close(weight.grad[8], torch.full((4,), 5 / 64), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_same_value_for_a_third_of_the_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_chunk_rows(100, monkeypatch)
    hidden_states, weight, targets = random_case()
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        with Watch() as with_gradients:
            expected = linear_cross_entropy(hidden_states, weight, targets, V)
        with torch.no_grad(), Watch() as without:
            loss = linear_cross_entropy(hidden_states, weight, targets, V)
    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad
    assert (with_gradients.n_products, without.n_products) == (6, 2)


@pytest.mark.parametrize("limit", ["bytes", "rows"])
def test_no_more_than_a_chunk_of_logits_is_in_memory(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(70 if limit == "bytes" else N, monkeypatch)
    monkeypatch.setitem(loss.CHUNK_ROWS, "cpu", N if limit == "bytes" else 70)
    hidden_states, weight, targets = random_case()
    with Watch() as watch:
        linear_cross_entropy(hidden_states, weight, targets, V).backward()
    assert watch.largest == 70 * V


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_a_model_gets_the_same_gradients(arch: str) -> None:
    """This holds also where the head is the embedding, whose gradient then has two parts."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(97, context_length=16, emb_dim=32, n_layers=1, n_heads=4, arch=arch))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(97, (4, 17))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    parameters = list(model.parameters())
    plain = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    ours = linear_cross_entropy(model.hidden_states(inputs), model.head_weight, targets, 97)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for expected, found in zip(
        torch.autograd.grad(plain, parameters), torch.autograd.grad(ours, parameters), strict=True
    ):
        assert_near(found, expected.double(), 1e-4)


def test_with_a_teacher_by_hand() -> None:
    """The model gives 1/4, 3/4 and the teacher 1/2, 1/2; the target is the second."""
    weight, hidden_states = torch.tensor([[0.0], [math.log(3)]]), torch.ones(1, 1, requires_grad=True)
    teacher = SoftTargets(torch.ones(1, 2), torch.zeros(2, 2), 0.25)
    loss = linear_cross_entropy(hidden_states, weight, torch.tensor([1]), 2, teacher)
    divergence = (math.log(1 / 2 / (1 / 4)) + math.log(1 / 2 / (3 / 4))) / 2
    assert loss.item() == pytest.approx(0.75 * -math.log(3 / 4) + 0.25 * divergence, rel=1e-6)
    loss.backward()
    assert hidden_states.grad is not None  # p - 0.75 onehot - 0.25 q, of the second logit, times its weight
    assert hidden_states.grad.item() == pytest.approx((3 / 4 - 0.75 - 0.25 / 2) * math.log(3), rel=1e-5)


@pytest.mark.parametrize("vocab_size", [V, V - 44])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n_rows", [67, 100, 1000])
def test_with_a_teacher(n_rows: int, share: float, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(n_rows, monkeypatch)
    hidden_states, weight, targets = random_case(vocab_size)
    weight.data[vocab_size:] = 100.0
    teacher = random_teacher(share, vocab_size)
    loss = linear_cross_entropy(hidden_states, weight, targets, vocab_size, teacher)
    loss.backward()
    expected = reference_with_teacher(hidden_states, weight, targets, teacher, vocab_size)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert_near(hidden_states.grad, expected[1], 1e-5)
    assert_near(weight.grad, expected[2], 1e-5)
    assert not weight.grad[vocab_size:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_a_teacher_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, whatever the types of the two hidden states; the sums are float32."""
    set_chunk_rows(67, monkeypatch)
    hidden_states, weight, targets = random_case(V - 44)
    teacher = random_teacher(0.5, V - 44, dtype)
    with torch.autocast("cpu", dtype):
        loss = linear_cross_entropy(hidden_states, weight, targets, V - 44, teacher)
    loss.backward()
    assert (loss.dtype, hidden_states.grad.dtype, weight.grad.dtype) == (torch.float32,) * 3
    expected = reference_with_teacher(hidden_states, weight, targets, teacher, V - 44)
    assert loss.item() == pytest.approx(expected[0].item(), abs=2e-2)  # of about 14
    assert_near(hidden_states.grad, expected[1], 0.03)
    assert_near(weight.grad, expected[2], 0.03)


def test_a_teacher_that_agrees_pulls_nowhere() -> None:
    hidden_states, weight, targets = random_case()
    teacher = SoftTargets(hidden_states.detach(), weight.detach(), 1.0)
    loss = linear_cross_entropy(hidden_states, weight, targets, V, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert weight.grad.abs().max() < 1e-6


def test_a_teacher_takes_no_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunk_rows(70, monkeypatch)
    hidden_states, weight, targets = random_case()
    with Watch() as watch:
        linear_cross_entropy(hidden_states, weight, targets, V, random_teacher()).backward()
    assert watch.largest == 70 * TEACHER_V


def test_no_gradient_reaches_the_teacher() -> None:
    hidden_states, weight, targets = random_case()
    teacher = random_teacher()
    teacher.hidden.requires_grad_()
    teacher.weight.requires_grad_()
    linear_cross_entropy(hidden_states, weight, targets, V, teacher).backward()
    assert teacher.hidden.grad is None
    assert teacher.weight.grad is None
