"""Every way to compute packed attention equals a plain float64 loop, in values and gradients."""

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon import varlen
from photon.varlen import BACKENDS, branch_attention, choose, packed_attention, set_backend, tree_attention

Inputs = tuple[Tensor, Tensor, Tensor]

WIDTH = 8
SCALE = 0.3
FP32 = 1e-5  # 1e-4 is what is asked for; sums of some 30 terms of size 1 in float32 (2^-24 each) stay below 1e-5
# Scores, probabilities, the result and the gradient that comes in are each rounded to 8 bits: 4 x 2^-9 of the largest
# value. Up to 7 query heads, each rounded so, add up in the gradient of one key: a factor of 4.
BF16 = 2**-5


def plain(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """softmax(scale q k) v in float64, query by query; ``visible`` is ``(T, keys)`` bool."""
    heads = []
    for h, q in enumerate(query):
        j = h * len(key) // len(query)
        rows = []
        for t, row in enumerate(q):
            seen = visible[t].nonzero()[:, 0]
            rows.append((SCALE * (key[j, seen] @ row)).softmax(0) @ value[j, seen])
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def packed_visible(lengths: list[int], causal: bool) -> Tensor:
    blocks = [torch.ones(n, n).tril() if causal else torch.ones(n, n) for n in lengths]
    return torch.block_diag(*blocks).bool()


def tree_visible(prefixes: list[int], suffixes: list[list[int]], masks: list[Tensor] | None = None) -> Tensor:
    """Order: all prefixes, then all questions."""
    rows = packed_visible([*prefixes, *(n for group in suffixes for n in group)], True)
    at, start = sum(prefixes), 0
    for g, group in enumerate(suffixes):
        for k, n in enumerate(group):
            rows[at : at + n, start : start + prefixes[g]] = True if masks is None else masks[g][k]
            at += n
        start += prefixes[g]
    return rows


def tensors(heads: int, shared: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Query, key, value as they come out of a layer: tokens first in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, WIDTH), (tokens, shared, WIDTH), (tokens, shared, WIDTH)]
    query, key, value = (torch.randn(s, generator=generator).to(dtype).transpose(0, 1).requires_grad_() for s in shapes)
    return query, key, value


def assert_agrees(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, visible: Tensor, tolerance: float
) -> None:
    """Result and gradients against the loop; ``tolerance`` is relative to the largest value, at least 1."""
    query, key, value = expected_inputs = [x.detach().double().requires_grad_() for x in inputs]
    expected = plain(query, key, value, visible)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
    expected.backward(weights.double())
    out = attend(*inputs)
    out.backward(weights)
    actuals, wanteds = [out, *(x.grad for x in inputs)], [expected, *(x.grad for x in expected_inputs)]
    for name, actual, wanted in zip(("out", "query", "key", "value"), actuals, wanteds, strict=True):
        assert actual is not None and wanted is not None and actual.dtype == inputs[0].dtype
        error = (actual.double() - wanted).abs().max().item()
        assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{name}: {error}"


@pytest.fixture(autouse=True)
def automatic() -> Iterator[None]:
    """No test leaves a fixed backend behind."""
    yield
    set_backend(None)


LENGTHS = st.one_of(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.tuples(st.integers(1, 7), st.integers(1, 4)).map(lambda x: [x[0]] * x[1]),
)
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (7, 1)])


@pytest.mark.parametrize("backend", ["padded", "grouped", None])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=LENGTHS, heads=HEADS, causal=st.booleans(), half=st.booleans(), seed=st.integers(0, 99))
def test_packed_attention_equals_the_loop(
    backend: str | None, lengths: list[int], heads: tuple[int, int], causal: bool, half: bool, seed: int
) -> None:
    inputs = tensors(*heads, sum(lengths), seed, torch.bfloat16 if half else torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, lengths, causal, SCALE, backend)

    assert_agrees(attend, inputs, packed_visible(lengths, causal), BF16 if half else FP32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [5, 5, 5], [15]])
def test_flex_equals_the_loop(lengths: list[int], causal: bool) -> None:
    """Values alone: FlexAttention has no gradient on the CPU. One total length, so that it is traced once."""
    query, key, value = (x.detach() for x in tensors(4, 2, 15, 0))
    out = packed_attention(query, key, value, lengths, causal, SCALE, "flex")
    expected = plain(query.double(), key.double(), value.double(), packed_visible(lengths, causal))
    torch.testing.assert_close(out.double(), expected, atol=FP32, rtol=0)


# What the two kernels do, for tests on a machine without a GPU. The signatures are theirs: flash-attn 2.8, and torch
# 2.10, between, and 2.12.


def kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """``(T, heads, E)`` with ``SCALE``; causal is aligned to the last key. Checks what the kernels take for granted."""
    for x, bounds, most in ((query, cu_q, max_q), (key, cu_k, max_k)):
        assert bounds.dtype == torch.int32 and bounds.is_contiguous() and bounds.device == x.device
        assert bounds[0] == 0 and bounds[-1] == len(x) and bounds.diff().max() == most
        assert x.is_contiguous()
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    sizes = list(zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True))
    blocks = [torch.ones(q, k).tril(k - q) if causal else torch.ones(q, k) for q, k in sizes]
    visible = torch.block_diag(*blocks).bool()
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    return plain(q, k, v, visible).to(query.dtype).transpose(0, 1)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert softmax_scale == SCALE and dropout_p == 0 and window_size == (-1, -1)
    return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)


def varlen_double(*keywords: str) -> Callable[..., Tensor]:
    """torch's function with these keywords after the bounds."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        assert set(options) <= set(keywords)
        assert options.get("enable_gqa") or query.shape[1] == key.shape[1]
        window = options.get("window_size", (-1, -1))
        assert window in ((-1, -1), (-1, 0))
        if "scale" in keywords:
            assert options["scale"] == SCALE
        else:  # it has its own
            query = query * (query.shape[-1] ** -0.5 / SCALE)
        causal = options.get("is_causal", window == (-1, 0))
        return kernel(query, key, value, cu_q, cu_k, max_q, max_k, causal)

    positional = list(inspect.signature(varlen_attn).parameters.values())[:-1]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords]
    varlen_attn.__signature__ = inspect.Signature([*positional, *named])  # type: ignore[attr-defined]
    return varlen_attn


VARLEN_2_12 = ("return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")
DOUBLES = {
    "flash": flash_attn_varlen_func,
    "varlen 2.10": varlen_double("is_causal", "return_aux"),
    "varlen 2.11": varlen_double("return_aux", "scale", "window_size"),
    "varlen 2.12": varlen_double(*VARLEN_2_12),
}


@pytest.fixture(params=DOUBLES)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel's backend, whose function is replaced by the double and which takes CPU tensors."""
    name = request.param.split()[0]
    function = {"flash": "flash_attn_varlen_func", "varlen": "varlen_attn"}[name]
    monkeypatch.setattr(varlen, function, DOUBLES[request.param])
    monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(why_not=lambda query: None))
    return name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1)])
def test_kernels_are_called_as_they_ask_for(stand_in: str, heads: tuple[int, int], causal: bool) -> None:
    """The convention alone (order, bounds, scale, causal, shared heads): the kernels themselves need a GPU, and a
    double of the same signature, computed from the bounds in float64, stands in for them."""
    lengths = [3, 1, 5, 3]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, lengths, causal, SCALE, stand_in)

    assert_agrees(attend, tensors(*heads, sum(lengths), 0), packed_visible(lengths, causal), FP32)


def test_the_installed_varlen_has_a_known_signature() -> None:
    """One of those that the doubles stand for, as far as they are used."""
    used = {"is_causal", "scale", "window_size", "enable_gqa"}
    known = [used & set(inspect.signature(double).parameters) for double in DOUBLES.values()]
    assert varlen.varlen_attn is None or used & set(inspect.signature(varlen.varlen_attn).parameters) in known


@pytest.mark.parametrize("visible", [False, True])
def test_trees_by_a_kernel_equal_the_loop(stand_in: str, visible: bool) -> None:
    """As above, the double in place of the kernel; what each question sees of its prefix is a mask, without one."""
    prefixes, suffixes = [4, 0, 2], [[2, 1], [3], [1, 2, 2]]
    masks = [torch.arange(len(s) * p).reshape(len(s), p) % 3 > 0 for p, s in zip(prefixes, suffixes, strict=True)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, prefixes, suffixes, SCALE, masks if visible else None, stand_in)

    inputs = tensors(4, 2, sum(prefixes) + sum(map(sum, suffixes)), 0)
    assert_agrees(attend, inputs, tree_visible(prefixes, suffixes, masks if visible else None), FP32)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    groups = draw(st.integers(1, 3))
    prefixes = draw(st.lists(st.integers(0, 6), min_size=groups, max_size=groups))
    questions = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    return prefixes, draw(st.lists(questions, min_size=groups, max_size=groups))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(tree=trees(), heads=HEADS, half=st.booleans(), partly=st.booleans(), seed=st.integers(0, 99))
def test_trees_equal_the_loop(
    tree: tuple[list[int], list[list[int]]], heads: tuple[int, int], half: bool, partly: bool, seed: int
) -> None:
    prefixes, suffixes = tree
    generator = torch.Generator().manual_seed(seed)
    groups = zip(prefixes, suffixes, strict=True)
    masks = [torch.rand(len(s), p, generator=generator) > 0.4 for p, s in groups] if partly else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, prefixes, suffixes, SCALE, masks)

    tokens = sum(prefixes) + sum(map(sum, suffixes))
    inputs = tensors(*heads, tokens, seed, torch.bfloat16 if half else torch.float32)
    assert_agrees(attend, inputs, tree_visible(prefixes, suffixes, masks), BF16 if half else FP32)


def test_questions_alone_attend_as_in_the_whole_tree(stand_in: str) -> None:
    """Where the prefixes' keys and values are stored, only the questions have queries."""
    prefixes, suffixes = [4, 0, 2], [[2, 1], [3], [1, 2, 2]]
    query, key, value = tensors(4, 2, 17, 0)
    whole = tree_attention(query, key, value, prefixes, suffixes, SCALE, backend="grouped")[:, 6:]
    for backend in ("grouped", stand_in):
        alone = tree_attention(query[:, 6:], key, value, prefixes, suffixes, SCALE, backend=backend)
        torch.testing.assert_close(alone, whole, atol=FP32, rtol=0)


@pytest.mark.parametrize("partly", [False, True])
def test_branches_equal_the_loop(partly: bool) -> None:
    """One group, prefix and own keys apart; the gradients of the prefix are the sum over the questions."""
    prefix, suffixes = 5, [2, 1, 4]
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool() if partly else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (first, own), (pk, k), (pv, v) = (x.split([prefix, sum(suffixes)], 1) for x in (query, key, value))
        trunk = packed_attention(first, pk, pv, [prefix], True, SCALE)
        return torch.cat([trunk, branch_attention(own, pk, pv, k, v, suffixes, SCALE, mask)], dim=1)

    visible = tree_visible([prefix], [suffixes], None if mask is None else [mask])
    assert_agrees(attend, tensors(4, 2, prefix + sum(suffixes), 3), visible, FP32)


class Recorder:
    """torch's attention, with a record of what it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Size, Tensor | None, bool]] = []
        self.original = torch.nn.functional.scaled_dot_product_attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.calls.append((query.shape, options.get("attn_mask"), options.get("is_causal", False)))
        return self.original(query, key, value, **options)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", recorder)
    return recorder


@pytest.mark.parametrize(
    ("lengths", "causal", "masked"), [([2, 5, 3], True, False), ([2, 5, 3], False, True), ([4, 4], False, False)]
)
def test_padding_is_masked_only_where_it_could_be_seen(
    recorder: Recorder, lengths: list[int], causal: bool, masked: bool
) -> None:
    packed_attention(*tensors(2, 2, sum(lengths), 0), lengths, causal, SCALE, "padded")
    ((shape, mask, is_causal),) = recorder.calls
    assert shape == (len(lengths), 2, max(lengths), WIDTH)
    assert is_causal == causal and (mask is not None) == masked


def test_grouped_calls_once_per_distinct_length(recorder: Recorder) -> None:
    lengths = [2, 5, 2, 1, 5, 2]
    packed_attention(*tensors(2, 1, sum(lengths), 0), lengths, True, SCALE, "grouped")
    assert sorted(shape[0] * shape[2] for shape, _, _ in recorder.calls) == [1, 6, 10]
    assert all(mask is None for _, mask, _ in recorder.calls)


def test_a_tree_passes_the_backend_on(recorder: Recorder) -> None:
    tree_attention(*tensors(2, 1, 9, 0), [4, 2], [[1], [2]], SCALE, backend="padded")
    assert [tuple(shape[::2]) for shape, _, _ in recorder.calls] == [(2, 4), (1, 1), (1, 2)]


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


def test_heads_are_repeated_for_sdpa_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There its fused kernels for float32 and for masks take equal heads alone, and the rest keeps all scores."""
    heads = []

    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        heads.append((key.shape[1], value.shape[1], options["enable_gqa"]))
        return query

    monkeypatch.setattr(varlen.F, "scaled_dot_product_attention", attend)
    query, key, value = tensors(4, 2, 6, 0)
    packed_attention(query, key, value, [6], True, SCALE)
    packed_attention(query.detach().as_subclass(OnGpu), key, value, [6], True, SCALE)
    assert heads == [(2, 2, True), (4, 4, False)]


def on_gpu(dtype: torch.dtype = torch.bfloat16, width: int = 128) -> Any:
    """What the choice looks at in a query on a GPU."""
    return SimpleNamespace(
        is_cuda=True, dtype=dtype, shape=(16, 10, width), device=torch.device("cuda:0"), requires_grad=True
    )


@pytest.mark.parametrize(
    ("missing", "query", "expected"),
    [
        ([], on_gpu(), "flash"),
        (["flash"], on_gpu(), "varlen"),
        (["flash", "varlen"], on_gpu(), "flex"),
        (["flash", "varlen", "flex"], on_gpu(), "grouped"),
        ([], on_gpu(torch.float16), "flash"),
        ([], on_gpu(torch.float32), "grouped"),
        ([], on_gpu(width=20), "flex"),
        ([], torch.zeros(2, 3, 8, dtype=torch.bfloat16), "grouped"),
    ],
)
def test_automatic_choice(monkeypatch: pytest.MonkeyPatch, missing: list[str], query: Tensor, expected: str) -> None:
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", None if "flash" in missing else flash_attn_varlen_func)
    monkeypatch.setattr(varlen, "varlen_attn", None if "varlen" in missing else DOUBLES["varlen 2.12"])
    found = None if "flex" in missing else object()
    monkeypatch.setattr(varlen.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose(query) == expected


def test_kernels_are_not_chosen_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", flash_attn_varlen_func)
    monkeypatch.setattr(varlen.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(on_gpu()) == "grouped"


def test_a_fixed_backend_is_used_until_it_is_released(recorder: Recorder) -> None:
    inputs = tensors(2, 2, 6, 0)
    set_backend("padded")
    packed_attention(*inputs, [2, 4], True, SCALE)
    packed_attention(*inputs, [2, 4], True, SCALE, "grouped")  # an argument goes before it
    set_backend(None)
    packed_attention(*inputs, [2, 4], True, SCALE)
    assert [shape[0] for shape, _, _ in recorder.calls] == [2, 1, 1, 1, 1]


def test_backends_that_cannot_be_used_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(2, 2, 6, 0)
    with pytest.raises(ValueError, match=r"no 'fast'; take one of flash, varlen, flex, padded, grouped"):
        set_backend("fast")
    with pytest.raises(ValueError, match=r"fast cannot be used here \(unknown\)"):
        packed_attention(*inputs, [2, 4], True, SCALE, "fast")
    with pytest.raises(
        ValueError, match=r"flex cannot be used here \(has no gradient on the CPU\); .* padded, grouped"
    ):
        packed_attention(*inputs, [2, 4], True, SCALE, "flex")
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", None)
    with pytest.raises(ValueError, match=r"flash cannot be used here \(not installed\)"):
        tree_attention(*inputs, [2], [[4]], SCALE, backend="flash")
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", flash_attn_varlen_func)
    set_backend("flash")
    with pytest.raises(ValueError, match=r"flash cannot be used here \(needs bfloat16 or float16 on a GPU\)"):
        packed_attention(*inputs, [2, 4], True, SCALE)


def test_sizes_that_do_not_fit_are_errors() -> None:
    query, key, value = tensors(2, 2, 6, 0)
    with pytest.raises(ValueError, match="lengths: they sum to 5, but there are 6 tokens"):
        packed_attention(query, key, value, [2, 3], True, SCALE)
    with pytest.raises(ValueError, match="suffixes: they sum to 5, but there are 6 tokens"):
        branch_attention(query, key, value, key, value, [5], SCALE)
    with pytest.raises(ValueError, match=r"visible: \(6, 2\), must be \(2, 6\)"):
        branch_attention(query, key, value, key, value, [2, 4], SCALE, torch.ones(6, 2).bool())
    with pytest.raises(ValueError, match=r"prefixes, suffixes: they sum to 5, but there are \(6, 6\) queries and keys"):
        tree_attention(query, key, value, [2], [[3]], SCALE)
    with pytest.raises(ValueError, match="prefixes, suffixes: 2 groups and 1"):
        tree_attention(query, key, value, [2, 0], [[4]], SCALE)


def test_empty_sequences_take_no_part(recorder: Recorder) -> None:
    query, key, value = tensors(2, 2, 6, 0)
    with_empty = packed_attention(query, key, value, [0, 3, 0, 3], True, SCALE)
    assert torch.equal(with_empty, packed_attention(query, key, value, [3, 3], True, SCALE))
    assert [shape[0] for shape, _, _ in recorder.calls] == [2, 2]
    assert packed_attention(query[:, :0], key[:, :0], value[:, :0], [0], True, SCALE).shape == (2, 0, WIDTH)
    assert tree_attention(query[:, :0], key[:, :0], value[:, :0], [0], [[]], SCALE).shape == (2, 0, WIDTH)


def test_bounds_are_made_once_and_can_be_saved_for_a_gradient() -> None:
    """All layers use the same tensors, and those made while generating serve training as well."""
    varlen._own_spans.cache_clear()
    with torch.inference_mode():
        first = varlen._own_spans((3, 1, 5), torch.device("cpu"))
        index, tree = varlen._tree_spans((2,), ((1, 3),), True, torch.device("cpu"))
        mask = varlen._branch_mask(2, (1, 3), torch.device("cpu"))
    assert varlen._own_spans((3, 1, 5), torch.device("cpu")) is first
    assert first.queries.tolist() == [0, 3, 4, 9] and first.most_keys == 5
    assert index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5]
    assert tree.queries.tolist() == [0, 2, 3, 6] and tree.keys.tolist() == [0, 2, 5, 10]
    assert not any(x.is_inference() for x in (first.queries, first.keys, index, tree.queries, tree.keys, mask))


def test_caches_are_bounded() -> None:
    caches = (varlen._own_spans, varlen._tree_spans, varlen._branch_mask, varlen._block_mask)
    assert all(cache.cache_info().maxsize for cache in caches)
