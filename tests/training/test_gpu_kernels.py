"""Loss and attention on a GPU against fp64, without waits and within their memory; skipped without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from savant_ray.model import flex
from savant_ray.model.attention import Mask, attend, build_masks, causal_mask
from savant_ray.model.loss import IGNORED, cross_entropy_sum, next_token_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

CUDA = torch.device("cuda")
needs_flex = pytest.mark.skipif(
    not torch.cuda.is_available() or not flex.has_flex(CUDA, 64),
    reason="flex_attention needs a C compiler, Python.h and compute capability 8.0",
)
KERNEL_OPTIONS = {
    "default": None,
    "forward_64": {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 2},
    "backward_64": {
        "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 4, "bwd_num_stages": 2,
    },
}  # fmt: skip


@contextmanager
def no_waits() -> Iterator[None]:
    """Turn every call that waits for the GPU into an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def packed_documents(rows: int, length: int) -> Tensor:
    """Documents of 80 to 250 tokens, and some padding at the end of each row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(80, 251, (rows, length // 80 + 1), generator=generator)
    ids = torch.searchsorted(lengths.cumsum(1), torch.arange(length).repeat(rows, 1), right=True)
    ids[:, -30:] = -1
    return ids.to(CUDA)


@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradients"), [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-5, 5e-3)]
)
@pytest.mark.parametrize("vocab_size", [1000, 1001])
@pytest.mark.parametrize("chunk_rows", [None, 128])
def test_the_loss_and_its_gradients_are_those_of_fp64_logits_of_the_same_inputs(
    chunk_rows: int | None, vocab_size: int, dtype: torch.dtype, of_loss: float, of_gradients: float
) -> None:
    """Logits are fp32 in each precision, so the loss is as exact in bf16; gradients of logits are rounded to bf16."""
    torch.manual_seed(0)
    x = torch.randn(3, 150, 64, device=CUDA).to(dtype).requires_grad_()
    head = torch.randn(vocab_size, 64, device=CUDA).to(dtype).requires_grad_()
    head.grad_dtype = torch.float32
    targets = torch.randint(0, vocab_size, (3, 150), device=CUDA)
    targets[:, -5:], targets[1, :] = IGNORED, IGNORED
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, head)]
    expected = F.cross_entropy((exact[0] @ exact[1].mT).flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    loss = cross_entropy_sum(x, head, targets, chunk_rows=chunk_rows)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=of_loss)
    assert relative_error(x.grad, exact[0].grad) < of_gradients
    assert relative_error(head.grad, exact[1].grad) < of_gradients
    assert not x.grad[targets == IGNORED].any()


def test_the_gradient_of_the_head_adds_up_in_fp32() -> None:
    """Use one equal row per chunk: a bf16 sum would stop growing after 256 of them."""
    x = torch.ones(1, 1024, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(2, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    head.grad_dtype = torch.float32
    cross_entropy_sum(x, head, torch.zeros(1, 1024, dtype=torch.int64, device=CUDA), chunk_rows=1).backward()
    assert torch.equal(head.grad.cpu(), torch.tensor([[-512.0] * 64, [512.0] * 64]))


def test_a_bf16_loss_without_gradients_is_the_one_with_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 150, 64, device=CUDA, dtype=torch.bfloat16)
    head = torch.randn(1000, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 1000, (2, 150), device=CUDA)
    with torch.no_grad():
        alone = cross_entropy_sum(x, head, targets)
    torch.testing.assert_close(alone, cross_entropy_sum(x, head, targets).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradients_wait_for_no_kernel(dtype: torch.dtype) -> None:
    documents = packed_documents(4, 512)
    tokens = torch.randint(0, 1000, documents.shape, device=CUDA)
    x = torch.randn(4, 512, 64, device=CUDA, dtype=dtype, requires_grad=True)
    head = torch.randn(1000, 64, device=CUDA, dtype=dtype, requires_grad=True)

    def loss_and_gradients() -> tuple[Tensor, ...]:
        loss = cross_entropy_sum(x, head, next_token_targets(tokens, documents))
        return loss.detach(), *torch.autograd.grad(loss, (x, head))

    first = loss_and_gradients()  # compiles
    with no_waits():  # in which a wait for a kernel is an error
        second = loss_and_gradients()
    assert all(torch.equal(before, after) for before, after in zip(first, second, strict=True))


@needs_flex
def test_masks_and_attention_wait_for_no_kernel() -> None:
    documents = packed_documents(4, 512)
    q, k, v = (torch.randn(4, 2, 512, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def outputs_and_gradients() -> list[Tensor]:
        tensors = []
        for mask in build_masks(documents, 100, 64):
            out = attend(q, k, v, mask, 50.0)
            tensors += [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
        return tensors

    first = outputs_and_gradients()  # compiles
    with no_waits():  # in which a wait for a kernel is an error
        second = outputs_and_gradients()
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(after, before)


def test_the_loss_takes_a_quarter_of_the_memory_of_all_logits() -> None:
    """For the guide's micro-batch of 12 x 1024 tokens with a vocabulary of 32,000."""
    x = torch.randn(12, 1024, 1024, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(32_000, 1024, device=CUDA, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    targets = torch.randint(0, 32_000, (12, 1024), device=CUDA)

    def all_logits() -> None:
        F.cross_entropy((x @ head.mT).float().flatten(0, 1), targets.flatten(), reduction="sum").backward()

    def chunks() -> None:
        cross_entropy_sum(x, head, targets).backward()

    assert peak_bytes(chunks) < 0.25 * peak_bytes(all_logits)


def peak_bytes(act: Callable[[], None]) -> int:
    """Peak of what `act` allocates the second time."""
    act()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    act()
    return torch.cuda.max_memory_allocated() - before


@needs_flex
@pytest.mark.parametrize("options", KERNEL_OPTIONS.values(), ids=KERNEL_OPTIONS)
@pytest.mark.parametrize(("soft_cap", "scale"), [(50.0, 1.0), (50.0, 4.0), (1e9, 1.0)])
def test_attention_in_bf16_is_off_by_its_rounding_only_with_each_choice_of_tiles(
    soft_cap: float, scale: float, options: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with fp64 for equal bf16 inputs, with the bounds of the test on CPUs."""
    monkeypatch.setattr(flex, "KERNEL_OPTIONS", options)
    torch.manual_seed(0)
    q, k, v = (
        (factor * torch.randn(2, 4, 512, 64, device=CUDA)).bfloat16().requires_grad_() for factor in (scale, scale, 1)
    )
    documents = packed_documents(2, 512)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    visible = (documents[:, None, :, None] == documents[:, None, None, :]) & causal_mask(512, 512, 100, CUDA)
    scores = soft_cap * torch.tanh(exact[0] @ exact[1].mT / 8 / soft_cap)
    expected = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1) @ exact[2]
    mask = build_masks(documents, 100, 64).windowed
    assert isinstance(mask, Mask) and mask.blocks is not None
    out = attend(q, k, v, mask, soft_cap)
    assert relative_error(out, expected) < 0.004
    gradients = [
        torch.autograd.grad(each.square().sum(), x) for each, x in ((out.float(), (q, k, v)), (expected, exact))
    ]
    for mine, other in zip(*gradients, strict=True):
        assert relative_error(mine, other) < 0.012
