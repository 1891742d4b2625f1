"""The same Llama in plain PyTorch, as a person would write it for speed: what the engine is measured against.

Batch first, SDPA, fused AdamW, autocast for bf16 (weights, gradients and moments stay fp32), documents attended to one
by one as in model/attention.py. Nothing of megatron-core, DeepSpeed or this project's rooms but the configuration.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention, silu
from torch.nn.parallel import DistributedDataParallel

from model.config import ModelConfig


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[batch, heads, sequence, head_size] turned by its positions."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


class Block(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_size = config.head_size or config.hidden_size // config.heads
        self.eps = config.norm_eps
        width = (self.heads + 2 * self.kv_heads) * self.head_size
        self.attention_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = nn.Parameter(torch.ones(config.hidden_size))
        self.qkv = nn.Linear(config.hidden_size, width, bias=False)
        self.out = nn.Linear(self.heads * self.head_size, config.hidden_size, bias=False)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """[batch, sequence, hidden] -> the same shape."""
        batch, sequence, width = hidden.shape
        fused = self.qkv(rms_norm(hidden, (width,), self.attention_norm, self.eps))
        query, key, value = (
            fused.view(batch, sequence, -1, self.head_size)
            .transpose(1, 2)
            .split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        )
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        attended = scaled_dot_product_attention(
            query.to(value.dtype), key.to(value.dtype), value, is_causal=True, enable_gqa=True
        )
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(rms_norm(hidden, (width,), self.mlp_norm, self.eps)).chunk(2, dim=-1)
        return hidden + self.down(silu(gate) * up)


class PlainLlama(nn.Module):
    """Tokens [batch, sequence] to logits [batch, sequence, vocabulary]."""

    def __init__(self, config: ModelConfig, vocabulary_size: int, sequence_length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.norm_eps
        self.output = nn.Linear(config.hidden_size, vocabulary_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.initial_std)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        head = config.head_size or config.hidden_size // config.heads
        angles = torch.outer(torch.arange(sequence_length), config.rope_base ** (-torch.arange(0, head, 2) / head))
        self.register_buffer("cosine", torch.cat((angles, angles), dim=-1).cos())
        self.register_buffer("sine", torch.cat((angles, angles), dim=-1).sin())

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, self.cosine, self.sine)
        return self.output(rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps))


class PlainLoop:
    """One optimizer step at a time, gradients accumulated over micro-batches; over several ranks by torch's
    `DistributedDataParallel`."""

    def __init__(
        self, model: PlainLlama, *, learning_rate: float, clip_norm: float, dtype: torch.dtype, ranks: int = 1
    ) -> None:
        self.model: nn.Module = DistributedDataParallel(model) if ranks > 1 else model
        self.clip_norm = clip_norm
        self.dtype = dtype
        self.phases: dict[str, float] = {}
        """Host seconds of the last step by phase."""
        self._device = model.norm.device
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def step(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> float:
        """The mean loss of the step's tokens in nats."""
        begun = time.perf_counter()
        total = torch.zeros(())
        for number, batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches) or not isinstance(self.model, DistributedDataParallel)
            with nullcontext() if last else self.model.no_sync():
                total += self._micro_batch(batch, len(micro_batches))
        ran = time.perf_counter()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.phases = {"forward_backward": ran - begun, "optimizer": time.perf_counter() - ran}
        return total.item()

    def _micro_batch(self, batch: Mapping[str, Tensor], count: int) -> Tensor:
        device = self._device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(batch["tokens"].to(device))
        loss = cross_entropy(logits.float().flatten(0, 1), batch["labels"].to(device).flatten())
        (loss / count).backward()
        return loss.detach().cpu() / count
