"""The block's weights, laid out once for all loops, compute what the parameters compute; their gradients are fp32 sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from savant_ray.config import ModelConfig
from savant_ray.model import transformer
from savant_ray.model.attention import Mask, build_masks
from savant_ray.model.loss import cross_entropy_sum, next_token_targets
from savant_ray.model.shared_weights import (
    Layout,
    SharedWeight,
    add_product,
    adds_bf16_products_to_fp32,
    linear,
    plain_layout,
    shared_weights,
    with_summed_gradients,
)
from savant_ray.model.transformer import BlockWeights, UniversalTransformer, ffn_dim

SMALL = ModelConfig(
    vocab_size=97, dim=32, n_heads=4, n_loops=5, max_seq_len=40, window_size=6, global_every=3, soft_cap=5.0
)  # its feed-forward network is 85 wide


@pytest.fixture
def packed_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out the weights on a CPU as on a GPU: one matrix for q, k and v, and a feed-forward network padded to 128."""
    monkeypatch.setitem(transformer.WEIGHT_PACKING, "cpu", transformer.WEIGHT_PACKING["cuda"])


def new_model(dtype: torch.dtype = torch.float32) -> UniversalTransformer:
    torch.manual_seed(0)
    model = UniversalTransformer(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.to(dtype)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    documents = torch.tensor([[0] * 30, [0] * 9 + [1] * 10 + [2] * 8 + [-1] * 3])
    return torch.where(documents >= 0, torch.randint(1, 97, (2, 30)), 0), documents


def loss_of(model: UniversalTransformer, hidden_states: Tensor) -> Tensor:
    return cross_entropy_sum(hidden_states, model.head.weight, next_token_targets(*batch()))


def loss_and_gradients(model: UniversalTransformer) -> dict[str, Tensor]:
    model.zero_grad()
    loss = loss_of(model, model.hidden_states(*batch()))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def gradients(model: UniversalTransformer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def from_parameters(model: UniversalTransformer) -> dict[str, Tensor]:
    """Loss and gradients with the parameters as they are, whose gradients autograd adds up."""
    model.zero_grad()
    tokens, documents = batch()
    masks = build_masks(documents, SMALL.window_size, SMALL.head_dim)
    x, block = model.embed(tokens), model.recurrent_block
    _, others = block.layouts()
    weights = BlockWeights(
        tuple(SharedWeight(block.attn.get_submodule(name).weight) for name in ("q_proj", "k_proj", "v_proj")),
        *(SharedWeight(layout.parameters[0]) for layout in others),
    )
    for loop in range(SMALL.n_loops):
        x = block(x, masks.for_loop(model.is_global(loop)), model.rope(0, tokens), None, weights)
    loss = loss_of(model, model.ln_f(x))
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Compare each tensor with the largest element of what is expected as its scale."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1e-3).item()
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_shared_weights_give_the_loss_and_gradients_of_the_parameters() -> None:
    model = new_model()
    assert_close(loss_and_gradients(model), from_parameters(model))


def test_one_product_for_q_k_and_v_and_a_padded_feed_forward_network_give_the_same(packed_as_on_a_gpu: None) -> None:
    model = new_model()
    weights = model.recurrent_block.prepare_weights()
    (qkv,), ffn_in = weights.qkv, weights.ffn_in
    assert qkv.value.shape == (3 * 32, 32) and ffn_in.value.shape == (2 * 128, 32) and ffn_dim(SMALL) == 85
    found = loss_and_gradients(model)
    assert_close(found, from_parameters(model))
    assert found["recurrent_block.ffn.0.weight"].shape == (2 * 85, 32)


def test_padding_leaves_parameters_and_files_as_they_are(packed_as_on_a_gpu: None) -> None:
    model = new_model()
    before = {name: (tensor.shape, tensor.clone()) for name, tensor in model.state_dict().items()}
    loss_and_gradients(model)
    for name, tensor in model.state_dict().items():
        assert tensor.shape == before[name][0] and torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_loops_give_the_same_gradients(dtype: torch.dtype, packed_as_on_a_gpu: None) -> None:
    model = new_model(dtype)
    kept = loss_and_gradients(model)
    model.recompute_loops = True
    recomputed = loss_and_gradients(model)
    assert all(torch.equal(recomputed[name], tensor) for name, tensor in kept.items())


def test_micro_batches_add_up_in_the_gradients_of_the_parameters() -> None:
    model = new_model()
    once = loss_and_gradients(model)
    loss_of(model, model.hidden_states(*batch())).backward()
    twice = gradients(model)
    assert all(torch.equal(twice[name], 2 * once[name]) for name in twice)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_loops_gradients_may_be_saved_by_autograd_although_other_loops_change_them(
    recompute: bool, packed_as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled loop may save them (PyTorch before pytorch/pytorch#171353): no loop changes the version of another's."""
    model, passed = new_model(), []
    model.recompute_loops = recompute
    forward = model.recurrent_block.forward

    def recorded(x: Tensor, mask: Mask, rope: None, update_cache: None, weights: BlockWeights) -> Tensor:
        passed.append(weights.ffn_out.gradient)
        return forward(x, mask, rope, update_cache, weights)

    monkeypatch.setattr(model.recurrent_block, "forward", recorded)
    assert_close(loss_and_gradients(model), from_parameters(new_model()))
    gradients = [gradient for gradient in passed if gradient is not None]
    assert len(gradients) >= SMALL.n_loops and len({gradient.data_ptr() for gradient in gradients}) == 1
    assert all(gradient._version == 1 for gradient in gradients)


def test_autograd_of_a_single_parameter_gets_its_gradient() -> None:
    model = new_model()
    expected = loss_and_gradients(model)["recurrent_block.attn.k_proj.weight"]
    loss = loss_of(model, model.hidden_states(*batch()))
    assert torch.equal(torch.autograd.grad(loss, model.recurrent_block.attn.k_proj.weight)[0], expected)


def test_under_autocast_a_weight_is_cast_once_and_its_gradient_is_close_to_fp32() -> None:
    model = new_model()
    exact = loss_and_gradients(model)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert all(weight.value.dtype == torch.bfloat16 for weight in model.recurrent_block.prepare_weights().qkv)
        loss = loss_of(model, model.hidden_states(*batch()))
    model.zero_grad()
    loss.backward()
    for name, gradient in gradients(model).items():
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twelve_products_with_a_weight_and_a_bias_add_their_gradients_in_fp32(dtype: torch.dtype) -> None:
    """In bf16 1 + 2**-9 is 1, so all but the first gradient would be lost."""
    weight, bias = (nn.Parameter(torch.ones(*shape, dtype=dtype)) for shape in ((4, 3), (4,)))
    for parameter in (weight, bias):
        parameter.grad_dtype = torch.float32
    layouts = [plain_layout(weight), plain_layout(bias)]
    shared = shared_weights(layouts, dtype)
    x = with_summed_gradients(torch.ones(1, 3, dtype=dtype), layouts, shared)
    sum(linear(x, *shared).sum() * factor for factor in (1.0, *[2**-9] * 11)).backward()
    expected = 1 + 11 * 2**-9
    assert torch.equal(weight.grad, torch.full((4, 3), expected))
    assert torch.equal(bias.grad, torch.full((4,), expected))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_weight_or_bias_gets_no_gradient_and_the_other_its_own(frozen: int) -> None:
    parameters = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))]
    parameters[frozen].requires_grad_(False)
    layouts = [plain_layout(parameter) for parameter in parameters]
    shared = shared_weights(layouts, torch.float32)
    linear(with_summed_gradients(torch.ones(2, 3), layouts, shared), *shared).sum().backward()
    assert parameters[frozen].grad is None and (parameters[1 - frozen].grad == 2).all()


def test_parameters_of_a_layout_get_the_gradients_of_their_part() -> None:
    left, right = (nn.Parameter(torch.randn(2, 3)) for _ in range(2))
    layouts = [Layout((left, right), (5, 3), lambda matrix: (matrix[:2], matrix[3:]))]
    (shared,) = weights = shared_weights(layouts, torch.float32)
    assert torch.equal(shared.value, torch.cat([left, torch.zeros(1, 3), right]))
    x = with_summed_gradients(torch.randn(4, 3), layouts, weights)
    factors = torch.arange(5.0)
    (linear(x, shared) * factors).sum().backward()
    torch.testing.assert_close(left.grad, torch.outer(factors[:2], x.sum(0)))
    torch.testing.assert_close(right.grad, torch.outer(factors[3:], x.sum(0)))


def test_without_gradients_no_memory_is_taken_for_them() -> None:
    model = new_model()
    with torch.no_grad():
        weights = model.recurrent_block.prepare_weights()
    assert weights.ffn_in.gradient is None
    assert weights.ffn_in.value.data_ptr() == model.recurrent_block.ffn[0].weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right, total = torch.randn(7, 4).to(dtype), torch.randn(7, 3).to(dtype), torch.randn(4, 3)
    expected, address = total + (left.mT @ right).float(), total.data_ptr()
    add_product(total, left, right)
    assert total.data_ptr() == address
    torch.testing.assert_close(total, expected)


@pytest.mark.filterwarnings("error")
def test_a_device_that_cannot_add_bf16_products_to_fp32_is_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"cannot add a bf16 product to an fp32 matrix on cpu"):
        assert not adds_bf16_products_to_fp32.__wrapped__(torch.device("cpu"))


def test_a_device_without_memory_for_the_first_product_is_not_taken_for_one_that_cannot_add(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is kept, and the other way of adding rounds differently: a resumed run would compute other bits."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(torch, "addmm", fail)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        adds_bf16_products_to_fp32.__wrapped__(torch.device("cpu"))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_block_adds_the_same_gradients_in_place(recompute: bool, packed_as_on_a_gpu: None) -> None:
    """The generated code calls the operator on the six sums themselves, not on copies of them."""
    from torch._inductor.utils import run_and_get_code

    model = new_model()
    model.recompute_loops = recompute
    expected = loss_and_gradients(model)
    model.recurrent_block.compile(dynamic=False, fullgraph=True)
    found, sources = run_and_get_code(loss_and_gradients, model)
    assert_close(found, expected)
    backward = [source for source in sources if "savant.add_product_.default(" in source]
    assert len(backward) == 1 and backward[0].count("savant.add_product_.default(primals_") == 6
    assert "auto_functionalized" not in backward[0]
