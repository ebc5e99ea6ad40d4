"""Equal results: packed = one document at a time, windowed = masked, cached = full forward, bf16 ~ fp32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from savant_ray.config import ModelConfig
from savant_ray.model.attention import Mask, attend, build_masks, causal_mask
from savant_ray.model.cpu_attention import _tanh_scores
from savant_ray.model.flex import block_mask, capped_score
from savant_ray.model.kv_cache import KeyValueCache
from savant_ray.model.loss import (
    IGNORED,
    cross_entropy_sum,
    gpu_chunk_rows,
    loss_and_gradient,
    next_token_targets,
)
from savant_ray.model.transformer import UniversalTransformer, n_parameters

SMALL = dict(vocab_size=61, dim=32, n_heads=2, n_loops=4, max_seq_len=32, window_size=5, global_every=2, soft_cap=50.0)


def make_model(**changes: object) -> UniversalTransformer:
    torch.manual_seed(1)
    return UniversalTransformer(ModelConfig(**(SMALL | changes)))


def packed_row() -> tuple[Tensor, Tensor, list[slice]]:
    """Three documents and padding in one row of 32."""
    tokens = torch.randint(1, 61, (1, 32))
    documents = torch.tensor([[0] * 11 + [1] * 3 + [2] * 14 + [-1] * 4])
    return tokens, documents, [slice(0, 11), slice(11, 14), slice(14, 28)]


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_packed_documents_give_the_logits_of_each_document_alone(positions: str) -> None:
    model = make_model(positions=positions)
    tokens, documents, parts = packed_row()
    together = model(tokens, documents)
    for part in parts:
        torch.testing.assert_close(together[:, part], model(tokens[:, part]), rtol=1e-5, atol=1e-5)


def test_padding_gives_finite_outputs_and_gradients() -> None:
    model = make_model()
    tokens = torch.zeros(2, 32, dtype=torch.long)
    documents = torch.full((2, 32), -1)
    documents[0, :3] = 0
    loss = cross_entropy_sum(
        model.hidden_states(tokens, documents), model.head.weight, next_token_targets(tokens, documents)
    )
    loss.backward()
    assert torch.isfinite(model.hidden_states(tokens, documents)).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("window_size", [1, 2, 5, 8, 31])
@pytest.mark.parametrize("sequence_length", [1, 7, 8, 32])
@pytest.mark.parametrize("chunk", [1, 8, 128])
def test_attention_in_chunks_of_queries_equals_dense_attention(
    window_size: int, sequence_length: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(window_size)
    monkeypatch.setattr("savant_ray.model.cpu_attention.CHUNK", chunk)
    q, k, v = (torch.randn(2, 3, sequence_length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    documents = torch.randint(0, 3, (2, sequence_length)).sort(dim=1).values
    same = documents[:, None, :, None] == documents[:, None, None, :]
    dense = Mask(~(same & causal_mask(sequence_length, sequence_length, window_size, q.device)))
    outputs = [attend(q, k, v, mask, 50.0) for mask in (dense, build_masks(documents, window_size, 8).windowed)]
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outputs]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)  # the cap works in fp32
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("under_autocast", [False, True])
@pytest.mark.parametrize("window_size", [None, 40])
def test_attention_in_bf16_has_fp32_scores_and_the_error_of_rounded_outputs(
    window_size: int | None, under_autocast: bool
) -> None:
    """Compare with fp64 for equal bf16 inputs; scores rounded to bf16 would have errors of 1.2 % and 2.4 %."""
    torch.manual_seed(0)
    q, k, v = ((scale * torch.randn(2, 4, 300, 64)).bfloat16().requires_grad_() for scale in (4, 4, 1))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    masked = ~causal_mask(300, 300, window_size, q.device)
    scores = 50 * torch.tanh(exact[0] @ exact[1].mT / 8 / 50)
    expected = torch.softmax(scores.masked_fill(masked, float("-inf")), dim=-1) @ exact[2]
    gradients = torch.autograd.grad(expected.square().sum(), exact)
    chunks = build_masks(torch.zeros(2, 300, dtype=torch.int64), window_size or 300, 64).for_loop(window_size is None)
    for mask in (Mask(masked), chunks):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast, cache_enabled=False):
            out = attend(q, k, v, mask, 50.0)
        assert relative_error(out, expected) < 0.004
        for found, exact_gradient in zip(
            torch.autograd.grad(out.float().square().sum(), (q, k, v)), gradients, strict=True
        ):
            assert relative_error(found, exact_gradient) < 0.012
    capped = 50 * _tanh_scores(q.detach(), k.detach(), 50.0)
    assert (capped - scores).abs().max() < 1e-4, "0.06 to 0.10 where the product is rounded to bf16"


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("window_size", [None, 0, 5, 127, 128, 300, 2000])
@pytest.mark.parametrize("length", [1, 128, 129, 300, 1024])
def test_block_masks_equal_those_of_create_block_mask(window_size: int | None, length: int) -> None:
    torch.manual_seed(length)
    for mean_length in (1, 30, 128, 500):
        is_last = torch.rand(3, length) < 1 / mean_length
        documents = is_last.cumsum(1).masked_fill(torch.arange(length) >= torch.tensor([[length], [200], [128]]), -1)

        def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same_document = documents[row, query] == documents[row, key]  # noqa: B023 - used within the loop only
            return same_document & (key <= query) & (key >= query - (length if window_size is None else window_size))

        expected = create_block_mask(visible, 3, None, length, length, device="cpu")
        mask = block_mask(documents, window_size)
        assert torch.equal(mask.to_dense(), expected.to_dense())
        for blocks in ("kv", "full_kv", "q", "full_q"):
            for indices, expected_indices in zip(listed(mask, blocks), listed(expected, blocks), strict=True):
                assert (
                    indices.dtype == expected_indices.dtype
                    and indices.is_contiguous()
                    and torch.equal(indices, expected_indices)
                ), blocks


def listed(mask: BlockMask, blocks: str) -> tuple[Tensor, Tensor]:
    """The number of blocks in each row, and their indices."""
    return getattr(mask, f"{blocks}_num_blocks"), getattr(mask, f"{blocks}_indices")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window_size", [None, 1, 5, 300])
@pytest.mark.parametrize("sequence_length", [7, 200])
def test_flex_attention_equals_dense_attention(window_size: int | None, sequence_length: int) -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 3, sequence_length, 16) for _ in range(3))
    documents = torch.randint(0, 3, (2, sequence_length)).sort(dim=1).values
    same = documents[:, None, :, None] == documents[:, None, None, :]
    dense = Mask(~(same & causal_mask(sequence_length, sequence_length, window_size, q.device)))
    blocks = Mask(None, blocks=block_mask(documents, window_size))  # forward only: on a CPU it has no backward pass
    torch.testing.assert_close(attend(q, k, v, blocks, 2.0), attend(q, k, v, dense, 2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("soft_cap", [2.0, 50.0, 100.0, 1e9])
def test_the_soft_cap_of_a_gpu_is_that_of_tanh_within_a_millionth_of_the_cap(soft_cap: float) -> None:
    """Compare with fp64; above a cap of 100 a GPU computes tanh as well."""
    sizes = torch.logspace(-6, 3, 10_001)
    scores = torch.cat([sizes, -sizes, torch.linspace(-8 * 50.0, 8 * 50.0, 100_001)]).requires_grad_()
    exact = scores.detach().double().requires_grad_()
    capped, expected = capped_score(scores, soft_cap), soft_cap * torch.tanh(exact / soft_cap)
    error = (capped - expected).abs()
    assert error.max() < 3e-7 * soft_cap if soft_cap <= 100 else (error <= 3e-7 * scores.abs()).all()
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each, x in ((capped, scores), (expected, exact))]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize("parts", [[1], [4], [20], [7, 9], [2, 1, 30, 5]])
def test_cached_decoding_gives_the_logits_of_the_full_forward_past_max_seq_len(
    parts: list[int], positions: str, static_shapes: bool
) -> None:
    """Tokens are decoded in these parts, and then one at a time; max_seq_len is 32."""
    model = make_model(positions=positions)
    tokens = torch.randint(0, 61, (2, 80))
    cache = model.new_cache([sum(parts)] * 2, static_shapes=static_shapes)
    assert_decoded_like_the_full_forward(model, tokens, cache, parts)


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("window_size", [1, 5, 255, 256, 290, 1000])
def test_cached_decoding_of_every_window_goes_on_after_its_buffers_have_grown(
    window_size: int, static_shapes: bool
) -> None:
    model = make_model(window_size=window_size)
    tokens = torch.randint(0, 61, (1, 300))  # the first buffers have 256 slots
    cache = model.new_cache([240], static_shapes=static_shapes)
    assert_decoded_like_the_full_forward(model, tokens, cache, [100, 140])


def assert_decoded_like_the_full_forward(
    model: UniversalTransformer, tokens: Tensor, cache: KeyValueCache, parts: list[int]
) -> None:
    full, end = model(tokens), 0
    for n_new in parts + [1] * (tokens.shape[1] - sum(parts)):
        logits = model.decode(tokens[:, end : end + n_new], cache)
        end += n_new
        torch.testing.assert_close(logits, full[:, end - 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_prompts_of_different_lengths_decode_as_they_would_alone(positions: str, static_shapes: bool) -> None:
    """The prompts are decoded in parts that begin after the ends of others. Later the rows are decoded in another order."""
    model = make_model(positions=positions)
    tokens = torch.randint(0, 61, (4, 60))
    lengths = [15, 11, 1, 14]
    cache = model.new_cache(lengths, static_shapes=static_shapes)
    last_logits = {}
    for start, end in ((0, 1), (1, 6), (6, 14), (14, 15)):
        logits = model.decode(tokens[:, start:end], cache)
        last_logits |= {row: [logits[row]] for row, length in enumerate(lengths) if start < length <= end}
    for order in ([0, 1, 2, 3], [2, 0, 2]):
        cache.select(order)
        for _ in range(20):
            logits = model.decode(tokens[torch.tensor(order), cache.position_B][:, None], cache)
            for row in set(order):
                last_logits[row].append(logits[order.index(row)])
    for row, n_prompt in enumerate([15, 11, 1, 14]):
        alone = model(tokens[row : row + 1])[0, n_prompt - 1 :]
        decoded = torch.stack(last_logits[row])
        torch.testing.assert_close(decoded, alone[: len(decoded)], rtol=1e-4, atol=1e-5)


def test_recomputed_loops_give_the_same_loss_and_gradients() -> None:
    tokens, documents, _ = packed_row()
    results = []
    for recompute in (False, True):
        model = make_model()
        model.recompute_loops = recompute
        loss = cross_entropy_sum(
            model.hidden_states(tokens, documents), model.head.weight, next_token_targets(tokens, documents)
        )
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def loss_sum(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """`cross_entropy_sum` as on a CPU, which drops rows without a target, and as on a GPU, which sets them to zero."""
    return partial(cross_entropy_sum, drops_rows=request.param)


@pytest.mark.parametrize("chunk_rows", [1, 4, 8, 1000])
def test_the_loss_in_chunks_is_the_cross_entropy_of_the_full_logits(
    loss_sum: Callable[..., Tensor], chunk_rows: int
) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    head = torch.randn(61, 24, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 61, (2, 17))
    targets[0, 7:17] = IGNORED  # all targets of a chunk of 8
    expected = torch.nn.functional.cross_entropy((x @ head.T).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = loss_sum(x, head, targets, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for found, exact in zip(
        torch.autograd.grad(3 * loss, (x, head)), torch.autograd.grad(3 * expected, (x, head)), strict=True
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_rows_without_a_target_do_not_affect_the_loss_and_have_zero_gradients(loss_sum: Callable[..., Tensor]) -> None:
    x, head = torch.randn(1, 12, 8), torch.randn(5, 8, requires_grad=True)
    targets = torch.tensor([[1, 2, IGNORED, 0, IGNORED, IGNORED, 4, 3, 2, IGNORED, IGNORED, IGNORED]])
    results = []
    for value in (0.0, 1e30, float("nan")):
        values = x.masked_fill((targets == IGNORED)[..., None], value).requires_grad_()
        loss = loss_sum(values, head, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, (values, head))])
        assert not results[-1][1][targets == IGNORED].any()
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_elementwise_part_of_the_loss_compiles_into_one_graph_that_leaves_the_logits_as_they_are(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    logits, targets = 5 * torch.randn(16, 61), torch.randint(0, 61, (16,))
    targets[3:9] = IGNORED
    before = logits.clone()
    compiled = torch.compile(loss_and_gradient, backend="aot_eager", fullgraph=True, dynamic=False)
    found = compiled(logits, targets, dtype)
    assert torch.equal(logits, before)
    expected = loss_and_gradient(logits, targets, dtype)
    assert found[1].dtype == dtype and not found[1][3:9].any()
    torch.testing.assert_close(found, expected)


def test_the_compiled_part_of_the_loss_has_no_operator_that_deterministic_kernels_would_replace() -> None:
    """`index_put_` would leave the compiled kernel, and sort the indices on a GPU."""
    from torch._dynamo.backends.common import aot_autograd  # takes seconds, which other processes need not wait for
    from torch._functorch.aot_autograd import make_boxed_func

    operators: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        operators.extend(getattr(node.target, "overloadpacket", None) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(loss_and_gradient, backend=aot_autograd(fw_compiler=keep), dynamic=False)
    compiled(torch.randn(4, 7), torch.tensor([1, 2, IGNORED, 6]), torch.bfloat16)
    assert torch.ops.aten.exp in operators
    replaced = {torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten.scatter, torch.ops.aten.index_copy}
    assert not replaced & set(operators)


def test_the_loss_holds_no_more_logits_than_those_of_a_chunk() -> None:
    """512 rows on a CPU; a tensor with all logits would have 20 times as many elements as the largest here."""

    class LargestTensor(TorchDispatchMode):
        n_elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
            self.n_elements = max(self.n_elements, *sizes, 0)
            return result

    x, head = torch.randn(10, 1024, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    with LargestTensor() as largest:
        cross_entropy_sum(x, head, torch.randint(0, 300, (10, 1024))).backward()
    assert largest.n_elements == 512 * 300


@pytest.mark.parametrize("n_rows", [1, 100, 128, 1024, 7 * 1024, 11 * 1024, 12 * 1024, 16 * 2048])
@pytest.mark.parametrize("vocab_size", [61, 2048, 32_000, 128_000, 1_000_000])
@pytest.mark.parametrize("limit_gb", [1.0, 6.0, 10.0, 80.0])
def test_a_gpus_chunks_have_one_aligned_size_that_fits_their_share_of_the_memory(
    n_rows: int, vocab_size: int, limit_gb: float
) -> None:
    rows = gpu_chunk_rows(n_rows, vocab_size, limit_gb)
    n_chunks = -(-n_rows // rows)
    assert rows % 128 == 0
    assert rows == 128 or rows * vocab_size * 4 <= min(0.5, limit_gb / 20) * 2**30
    assert n_chunks * rows - n_rows < 128 * n_chunks, "less than 128 added rows in each chunk"


def test_a_gpu_computes_a_third_of_the_guides_micro_batch_at_a_time() -> None:
    assert gpu_chunk_rows(12 * 1024, 32_000, 10.0) == gpu_chunk_rows(12 * 1024, 32_000, 80.0) == 4096
    assert gpu_chunk_rows(12 * 1024, 32_000, 6.0) == 2048


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_loss_under_autocast_is_within_a_thousandth_of_full_fp32_logits_and_two_percent_of_their_gradients(
    loss_sum: Callable[..., Tensor], stream: torch.dtype, weights: torch.dtype
) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 40, 64).to(stream).requires_grad_()
    head = (0.2 * torch.randn(61, 64)).to(weights).requires_grad_()
    targets = torch.randint(0, 61, (2, 40))
    full = torch.nn.functional.cross_entropy(
        (x.float() @ head.float().T).flatten(0, 1), targets.flatten(), reduction="sum"
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss = loss_sum(x, head, targets, chunk_rows=32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=1e-3, atol=0)
    gradients = (torch.autograd.grad(each, (x, head)) for each in (loss, full))
    for found, exact in zip(*gradients, strict=True):
        assert found.dtype == exact.dtype and (found - exact).float().norm() < 0.02 * exact.float().norm()


def test_the_gradient_of_an_fp32_head_adds_up_in_fp32_under_autocast() -> None:
    """Use one equal row per chunk: a bf16 sum would stop growing after 256 of them."""
    x, head = torch.ones(1, 1024, 4, requires_grad=True), torch.zeros(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss = cross_entropy_sum(x, head, torch.zeros(1, 1024, dtype=torch.int64), chunk_rows=1)
    loss.backward()
    assert torch.equal(head.grad, torch.tensor([[-512.0] * 4, [512.0] * 4]))


def test_without_autograd_the_loss_computes_no_gradients() -> None:
    """The head is a parameter that requires a gradient."""

    class Products(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.n += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
            return function(*args, **(kwargs or {}))

    x, head = torch.randn(1, 4, 8), torch.nn.Parameter(torch.randn(5, 8))
    targets = torch.ones(1, 4, dtype=torch.int64)
    with Products() as products, torch.no_grad():
        loss = cross_entropy_sum(x, head, targets)
    with Products() as products_with_gradients:
        expected = cross_entropy_sum(x, head, targets)
    assert (products.n, products_with_gradients.n) == (1, 3) and not loss.requires_grad
    assert torch.equal(loss, expected)


def test_a_batch_without_any_target_has_loss_zero_and_zero_gradients(loss_sum: Callable[..., Tensor]) -> None:
    x = torch.randn(1, 4, 8, requires_grad=True)
    head = torch.randn(5, 8, requires_grad=True)
    loss = loss_sum(x, head, torch.full((1, 4), IGNORED))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not head.grad.any()


def test_targets_end_with_their_document_and_padding_has_none() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 0]])
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    assert next_token_targets(tokens, documents).tolist() == [[6, IGNORED, 8, 9, IGNORED, IGNORED]]


def test_a_token_that_is_not_trained_on_is_no_target_of_the_token_before_it() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9, 0]])
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    is_trained = torch.tensor([[False, True, True, False, True, True]])
    assert next_token_targets(tokens, documents, is_trained).tolist() == [[6, IGNORED, IGNORED, 9, IGNORED, IGNORED]]
    nothing = next_token_targets(tokens, documents, torch.zeros_like(is_trained))
    assert (nothing == IGNORED).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_before_a_masked_token_have_exactly_zero_gradient(
    loss_sum: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    x = torch.randn(2, 20, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(61, 8, dtype=dtype, requires_grad=True)
    tokens, documents = torch.randint(0, 61, (2, 20)), torch.zeros(2, 20, dtype=torch.int64)
    is_trained = torch.rand(2, 20) < 0.4
    results = []
    for replacement in (tokens, torch.where(is_trained, tokens, 7)):
        loss = loss_sum(x, head, next_token_targets(replacement, documents, is_trained))
        results.append((loss, *torch.autograd.grad(loss, (x, head))))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    has_target = torch.nn.functional.pad(is_trained[:, 1:], (0, 1))
    assert torch.equal(results[0][1].any(dim=-1), has_target)


def test_bf16_stays_within_two_percent_of_the_fp32_loss_and_five_of_its_gradients() -> None:
    tokens = torch.randint(0, 61, (4, 32))
    documents = torch.zeros_like(tokens)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model().to(dtype)
        for p in model.parameters():
            p.grad_dtype = torch.float32
        loss = cross_entropy_sum(
            model.hidden_states(tokens, documents), model.head.weight, next_token_targets(tokens, documents)
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_the_size_of_a_model_is_known_before_it_is_built() -> None:
    for changes in ({}, {"dim": 48, "vocab_size": 100}):
        model = make_model(**changes)
        assert n_parameters(model.config) == sum(p.numel() for p in model.parameters())
