"""What others offer for the same work, timed in turns with ours.

Peers of torch run in a process of their own, one call at a time, alternating with ours: torch's
OpenMP threads spin for a while after a parallel region, and XLA's pool beside them in one process
would lose the cores to them; the two may also live in different environments. This file is run as
a script there and must not import jax. The process answers lines of JSON:
    {"gemm": n, "dtype": d}        -> {"tflops": …}
    {"make": name, "case": {…}}    -> {} once it is compiled and warm, or {"absent" | "error": why}
    {"run": name}                  -> {"seconds": …}
    {"drop": name}                 -> {}
"""

# What the other process imports is installed there, if anywhere.
# pyright: reportMissingImports=false

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# --- This side: no torch --------------------------------------------------------------------------


class Peers:
    """The torch process; `None` answers for everything where there is none."""

    def __init__(self, python: str = sys.executable):
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        # -P: this folder is no place to import from.
        command = [python, "-P", __file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self.ask()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request; without one, what the process says of itself at its start."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        if request:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of the peers ended with {process.wait()}: {request}")
        return json.loads(line)

    def program(self, name: str) -> Callable[[int], float]:
        """A program for `bench.interleaved`: the seconds that one call took over there."""
        return lambda repeat: self.ask(run=name)["seconds"]

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(timeout=60)


# --- The process of torch -------------------------------------------------------------------------


def _normal(torch, *shape, dtype, device, grad=False, scale=1.0):
    x = (torch.randn(*shape, device=device) * scale).to(dtype)
    return x.requires_grad_(grad)


def _attention_inputs(torch, case, dtype, device, grad):
    b, t, n, k, h = (case[x] for x in "BTNKH")
    query = _normal(torch, b, n, t, h, dtype=dtype, device=device, grad=grad)
    key, value = (_normal(torch, b, k, t, h, dtype=dtype, device=device, grad=grad) for _ in "kv")
    return query, key, value


def _with_backward(torch, forward, inputs, grad: bool):
    if not grad:
        return lambda: forward(*inputs)

    d_out = torch.randn_like(forward(*inputs).detach())

    def both():
        return torch.autograd.grad(forward(*inputs), inputs, d_out)

    return both


def flex_attention(
    torch: Any, case: Mapping[str, Any], dtype: Any, device: str, grad: bool
) -> Callable:
    """The same visible pairs, through one set of operands: it knows no second one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if grad and device == "cpu":
        raise NotImplementedError("flex_attention has no CPU backward")
    window, count, length = case["w"], case["g"], case["T"]

    def shown(b, h, i, j):
        return (i >= j) & ((i - j < window) | (j < count))

    # Compiled, it never holds the dense mask: 17 GB at 131,072 tokens.
    mask = create_block_mask(
        shown, None, None, length, length, device=device, _compile=device == "cuda"
    )
    compiled = torch.compile(flex_attention)
    inputs = _attention_inputs(torch, case, dtype, device, grad)
    shared = case["N"] != case["K"]

    def forward(query, key, value):
        return compiled(query, key, value, block_mask=mask, enable_gqa=shared)

    return _with_backward(torch, forward, inputs, grad)


def sdpa(torch: Any, case: Mapping[str, Any], dtype: Any, device: str, grad: bool) -> Callable:
    """Dense causal attention: what one runs who has no Λ kernel."""
    attend = torch.nn.functional.scaled_dot_product_attention
    inputs = _attention_inputs(torch, case, dtype, device, grad)
    shared = case["N"] != case["K"]

    def forward(query, key, value):
        return attend(query, key, value, is_causal=True, enable_gqa=shared)

    return _with_backward(torch, forward, inputs, grad)


def blockwise(torch: Any, case: Mapping[str, Any], dtype: Any, device: str, grad: bool) -> Callable:
    """The formulation of LM-Infinite's authors, written anew: blocks of w queries, each paired with
    its own and the preceding block of keys, and with the first g keys in the global branch.
    """
    window, count, length = case["w"], case["g"], case["T"]
    group = case["N"] // case["K"]
    pad = -length % window
    blocks = (length + pad) // window
    rows = torch.arange(window, device=device)
    apart = rows[:, None] + window - torch.arange(2 * window, device=device)[None]
    near = ((apart >= 0) & (apart < window))[None].repeat(blocks, 1, 1)
    near[0, :, :window] = False
    row = torch.arange(length + pad, device=device).reshape(blocks, window, 1)
    far = row - torch.arange(count, device=device) >= window
    shown = torch.cat([far, near], -1)

    def forward(query, key, value):
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        query, key_, value_ = (
            torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (blocks, window))
            for x in (query, key, value)
        )

        def paired(x):  # each block after the one before it
            previous = torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
            return torch.cat([previous, x], 3)

        first = key[:, :, None, :count]
        logits = (
            torch.cat([query @ first.mT, query @ paired(key_).mT], -1) * query.shape[-1] ** -0.5
        )
        weights = logits.masked_fill(~shown, -math.inf).softmax(-1)
        out = weights[..., :count] @ value[:, :, None, :count] + weights[..., count:] @ paired(
            value_
        )
        return out.flatten(2, 3)[:, :, :length]

    inputs = _attention_inputs(torch, case, dtype, device, grad)
    return _with_backward(torch, forward, inputs, grad)


def _loss_inputs(torch, case, dtype, device, grad):
    rows, width, vocab = (case[x] for x in "NDV")
    embeddings = _normal(torch, rows, width, dtype=dtype, device=device, grad=grad)
    classifier = _normal(torch, vocab, width, dtype=dtype, device=device, grad=grad, scale=0.05)
    return embeddings, classifier, torch.randint(0, vocab, (rows,), device=device)


def _loss_with_backward(torch, loss, inputs, grad):
    embeddings, classifier, labels = inputs
    if not grad:
        return lambda: loss(embeddings, classifier, labels)
    return lambda: torch.autograd.grad(loss(*inputs), (embeddings, classifier))


def dense_loss(
    torch: Any, case: Mapping[str, Any], dtype: Any, device: str, grad: bool
) -> Callable:
    """All logits, in float32."""

    def loss(embeddings, classifier, labels):
        return torch.nn.functional.cross_entropy((embeddings @ classifier.T).float(), labels)

    inputs = _loss_inputs(torch, case, dtype, device, grad)
    return _loss_with_backward(torch, loss, inputs, grad)


def cut_cross_entropy(
    torch: Any,
    case: Mapping[str, Any],
    dtype: Any,
    device: str,
    grad: bool,
    implementation: str = "cce",
) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    if implementation == "cce" and device == "cpu":
        raise NotImplementedError("its kernels need a GPU; torch_compile is the form for CPUs")

    def loss(embeddings, classifier, labels):
        return linear_cross_entropy(embeddings, classifier, labels, impl=implementation)

    inputs = _loss_inputs(torch, case, dtype, device, grad)
    return _loss_with_backward(torch, loss, inputs, grad)


def cut_cross_entropy_compiled(
    torch: Any, case: Mapping[str, Any], dtype: Any, device: str, grad: bool
) -> Callable:
    return cut_cross_entropy(torch, case, dtype, device, grad, "torch_compile")


def liger(torch: Any, case: Mapping[str, Any], dtype: Any, device: str, grad: bool) -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if device == "cpu":
        raise NotImplementedError("liger needs a GPU")
    fused = LigerFusedLinearCrossEntropyLoss()

    def loss(embeddings, classifier, labels):
        return fused(classifier, embeddings, labels)

    inputs = _loss_inputs(torch, case, dtype, device, grad)
    return _loss_with_backward(torch, loss, inputs, grad)


# name -> operation, the package that must be there, how to make it
PEERS: dict[str, tuple[str, str, Callable]] = {
    "torch.flex_attention": ("lambda_attention", "torch", flex_attention),
    "torch.sdpa (dense causal)": ("lambda_attention", "torch", sdpa),
    "torch blockwise original": ("lambda_attention", "torch", blockwise),
    "torch dense": ("linear_cross_entropy", "torch", dense_loss),
    "cut-cross-entropy cce": ("linear_cross_entropy", "cut_cross_entropy", cut_cross_entropy),
    "cut-cross-entropy torch_compile": (
        "linear_cross_entropy", "cut_cross_entropy", cut_cross_entropy_compiled,
    ),
    "liger-kernel": ("linear_cross_entropy", "liger_kernel", liger),
}  # fmt: skip


def _serve(answer: Callable[[dict[str, Any]], None]) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    made: dict[str, Callable] = {}

    def timed(program: Callable) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        program()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def make(name: str, case: dict) -> dict[str, Any]:
        _, package, build = PEERS[name]
        if importlib.util.find_spec(package) is None:
            return {"absent": package}
        # Whatever a peer raises, out of memory included, is what it has to say.
        try:
            dtype = getattr(torch, case["dtype"])
            program = build(torch, case, dtype, device, case["grad"])
            timed(program)
        except Exception as reason:
            if device == "cuda":
                torch.cuda.empty_cache()
            return {"error": f"{type(reason).__name__}: {str(reason).splitlines()[0][:200]}"}
        made[name] = program
        return {}

    def gemm(size: int, dtype: str) -> float:
        a, b = (
            _normal(torch, size, size, dtype=getattr(torch, dtype), device=device) for _ in "ab"
        )
        return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(7)) / 1e12

    installed = {"torch": torch.__version__}
    with contextlib.suppress(ImportError):
        import triton

        installed["triton"] = triton.__version__
    answer(installed)
    for line in sys.stdin:
        request = json.loads(line)
        if "make" in request:
            answer(make(request["make"], request["case"]))
        elif "run" in request:
            answer({"seconds": timed(made[request["run"]])})
        elif "drop" in request:
            made.pop(request["drop"], None)
            if device == "cuda":
                torch.cuda.empty_cache()
            answer({})
        else:
            answer({"tflops": gemm(request["gemm"], request["dtype"])})


def _main() -> None:
    # Only answers go to stdout: whatever torch or a compiler prints goes to stderr.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(result: dict[str, Any]) -> None:
        out.write(json.dumps(result) + "\n")
        out.flush()

    if importlib.util.find_spec("torch") is None:
        answer({"absent": "torch"})
        return
    _serve(answer)


if __name__ == "__main__":
    _main()
