"""A plain torch training loop of a Llama shape: one JSON object on stdout.

    .venv-parity/bin/python benchmarks/peer_torch_training.py '{"width": 320, …}'

For a Python with torch; nothing of lminf is imported. Float32 on two threads, torch's own fused
causal attention, cross-entropy and AdamW.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

THREADS = 2


class Block(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.heads, self.kv_heads = m["num_heads"], m["num_kv_heads"]
        width, head = m["width"], m["width"] // m["num_heads"]
        self.q = nn.Linear(width, self.heads * head, bias=False)
        self.k = nn.Linear(width, self.kv_heads * head, bias=False)
        self.v = nn.Linear(width, self.kv_heads * head, bias=False)
        self.o = nn.Linear(self.heads * head, width, bias=False)
        self.gate = nn.Linear(width, m["hidden_dim"], bias=False)
        self.up = nn.Linear(width, m["hidden_dim"], bias=False)
        self.down = nn.Linear(m["hidden_dim"], width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k(y).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = self.v(y).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads
        )
        x = x + self.o(seen.transpose(1, 2).reshape(batch, length, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotate(x, cos, sin):
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


class Model(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.embed = nn.Embedding(m["vocab_size"], m["width"])
        nn.init.normal_(self.embed.weight, std=m["width"] ** -0.5)
        self.blocks = nn.ModuleList(Block(m) for _ in range(m["num_layers"]))
        self.norm = nn.RMSNorm(m["width"], eps=1e-5)
        head = m["width"] // m["num_heads"]
        angles = torch.outer(
            torch.arange(m["length"]).float(),
            m["rope_base"] ** (-torch.arange(0, head, 2).float() / head),
        )
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(x) @ self.embed.weight.T


def main():
    m = json.loads(sys.argv[1])
    torch.set_num_threads(THREADS)
    torch.manual_seed(m["seed"])
    model = Model(m)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    noise = torch.randint(0, m["vocab_size"], (m["batch"], m["length"] + 1))
    tokens, targets = noise[:, :-1], noise[:, 1:].reshape(-1)

    def step():
        loss = F.cross_entropy(model(tokens).view(-1, m["vocab_size"]), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    for _ in range(2):
        step()
    started = time.perf_counter()
    for _ in range(m["steps"]):
        loss = step()
    seconds = (time.perf_counter() - started) / m["steps"]
    speed = m["batch"] * m["length"] / seconds
    print(json.dumps({"seconds": seconds, "tokens_per_second": speed, "loss": loss}))


if __name__ == "__main__":
    main()
