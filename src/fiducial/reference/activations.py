"""Bytes a forward and backward pass needs for each token, from the model's sizes.

What autograd stores for one token in one layer, with hidden width h, query and key widths q and k, MLP width
m (docs/reference.md spells it out):

    norms       Σ width · (4 + s)      input, always float32; normalised value where the norm's weight is
    trained attention   a · (2q + 2k)          queries, keys, values, output
    inputs      a · h · readers        what trained projections read; autocast casts once for each of them
    MLP         a · (3m or m) + a · m  gate, its activation and up (or the one hidden layer); what goes down

a is the byte width of products, s of the residual stream. With gradient checkpointing a layer keeps its input
alone, s · h, and one layer at a time is stored in full.
"""

from dataclasses import dataclass, replace

from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts
from fiducial.reference.precision import BYTES, HeldPrecision
from fiducial.reference.trained import name_in_first_layer, target_weights, untrained_layers

HEAD_KEPT_BYTES = {"cpu": 2**28, "gpu": 2**30}
"""Logits a trained head holds from forward to backward (`model.head` has the same number)."""
HEAD_CHUNK_LOGITS = {"cpu": 2**20, "gpu": 2**26}
HEAD_SMALLEST_CHUNK = 512
"""Logits the head makes at a time, and the fewest vocabulary entries of a chunk."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv")
_UP = ("gate_proj", "up_proj", "gate_up_proj", "dense_h_to_4h", "fc1", "c_fc", "w1", "w3")
_DOWN = ("down_proj", "dense_4h_to_h", "fc2", "w2")


@dataclass(frozen=True, slots=True)
class _Readers:
    """How many trained projections of a layer read each of its inputs."""

    attention: int
    up: int
    down: int
    norms: bool
    """Whether norm weights are trained."""


def stored_bytes_per_token(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> int:
    """Bytes autograd keeps for each token of the backbone between forward and backward."""
    sizes = facts.model.sizes
    layer = _layer_bytes(cfg, facts, precision)
    final_norm = sizes.hidden * (4 + precision.residual)
    layers = sizes.layers - untrained_layers(cfg, facts)  # backward does not go down to those
    if cfg.model.gradient_checkpointing:
        return layers * sizes.hidden * precision.residual + final_norm
    return layers * layer + final_norm


@dataclass(frozen=True, slots=True)
class Logits:
    """Arrays of logits, of which no more than `most` bytes are held whatever the number of tokens."""

    most: int
    per_token: int
    """Bytes of the whole vocabulary's."""


@dataclass(frozen=True, slots=True)
class PassBytes:
    """Memory of one forward (and backward) pass: a part for each token, and parts that do not grow."""

    per_token: int
    logits: tuple[Logits, ...]
    constant: int = 0
    """What is taken however few the tokens are."""

    @property
    def fixed(self) -> int:
        """What does not grow with the tokens, once there are many."""
        return self.constant + sum(part.most for part in self.logits)

    def of(self, tokens: int) -> int:
        """Bytes of a pass over `tokens` tokens."""
        logits = sum(min(part.most, tokens * part.per_token) for part in self.logits)
        return self.constant + tokens * self.per_token + logits


def training_pass(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> PassBytes:
    """Peak bytes of a training pass, every token counted as scored (an upper bound).

    Beside what is stored: the gradients of the layer the backward is in, its recomputed activations under
    gradient checkpointing, and the head's hidden states, kept logits and chunk. A loss that compares whole
    distributions walks a second head beside the policy's.
    """
    sizes = facts.model.sizes
    width = sizes.intermediate * sizes.active_experts
    working = 3 * (width * precision.products + sizes.hidden * precision.residual)
    if cfg.model.gradient_checkpointing:
        working += _layer_bytes(cfg, facts, precision)
    heads = [_head(facts, precision)]
    if cfg.method is not None and cfg.method.needs_distribution:
        heads.append(_second_head(cfg, facts, precision))
    most = 0 if cfg.adapter is not None else HEAD_KEPT_BYTES["gpu" if precision.gpu else "cpu"]
    kept = Logits(most, precision.products * sizes.vocab_size)
    stored = stored_bytes_per_token(cfg, facts, precision)
    return PassBytes(
        stored + working + sum(head.per_token for head in heads),
        (kept, *(part for head in heads for part in head.logits)),
        sum(head.constant for head in heads),
    )


def scoring_pass(facts: Facts, precision: HeldPrecision) -> PassBytes:
    """Peak bytes of a pass without gradient: one layer at a time, and the head's chunk."""
    sizes = facts.model.sizes
    width = sizes.intermediate * sizes.active_experts
    layer = precision.products * (2 * sizes.queries + 2 * sizes.keys + 3 * width) + 4 * 3 * sizes.hidden
    head = _head(facts, precision)
    return PassBytes(layer + head.per_token, head.logits)


def _head(facts: Facts, precision: HeldPrecision) -> PassBytes:
    """Hidden states of scored positions with their gradient, and two arrays of one chunk's logits."""
    sizes = facts.model.sizes
    chunk = min(sizes.vocab_size, HEAD_SMALLEST_CHUNK)
    per_token = sizes.hidden * (precision.products + 4) + 2 * 4 * chunk
    most = 2 * 4 * HEAD_CHUNK_LOGITS["gpu" if precision.gpu else "cpu"]
    return PassBytes(per_token, (Logits(most, 2 * 4 * sizes.vocab_size),))


def _second_head(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> PassBytes:
    """The reference's hidden states, their head's chunk, and where the head is trained its gradient again.

    Backward makes four arrays of a chunk at once: both logits, their exponentials.
    """
    sizes = facts.model.sizes
    once_more = sizes.vocab_size * sizes.hidden * BYTES[precision.weights] if cfg.adapter is None else 0
    return replace(_head(facts, precision), constant=once_more)


def _layer_bytes(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> int:
    sizes = facts.model.sizes
    readers = _readers(cfg, facts)
    if not precision.casts:  # inputs already have the products' precision: all readers share one
        readers = _Readers(min(readers.attention, 1), min(readers.up, 1), readers.down, readers.norms)
    width = sizes.intermediate * sizes.active_experts
    norms = _norm_width(facts) * (4 + precision.residual * readers.norms)
    attention = 2 * sizes.queries + 2 * sizes.keys
    inputs = sizes.hidden * (readers.attention + readers.up)
    mlp = width * ((3 if facts.model.gated else 1) + min(readers.down, 1))
    return norms + precision.products * (attention + inputs + mlp)


def _readers(cfg: RunConfig, facts: Facts) -> _Readers:
    names = _first_layer(facts)
    trained = {
        name
        for name, shape in names.items()
        if len(shape) == 2 and not name.endswith((".bias", "router.weight"))
    }
    if cfg.adapter is not None:
        targets = {module for module, _ in target_weights(cfg.adapter, facts)}
        found = (name_in_first_layer(f"{module}.weight") for module in targets)
        trained = {name for name in found if name is not None}

    def count(ends: tuple[str, ...]) -> int:
        return len({name.split(".")[-2] for name in trained if name.split(".")[-2] in ends})

    return _Readers(count(_ATTENTION), count(_UP), count(_DOWN), cfg.adapter is None)


def _norm_width(facts: Facts) -> int:
    """Values a token's norms read in one layer; norms of single heads run over all heads."""
    sizes = facts.model.sizes
    per_head = {"q_norm": sizes.heads, "k_norm": sizes.kv_heads}
    total = 0
    for name, shape in _first_layer(facts).items():
        if len(shape) == 1 and name.endswith(".weight"):
            repeats = per_head.get(name.split(".")[-2], 1) if shape[0] == sizes.head_dim else 1
            total += shape[0] * repeats
    return total or 2 * sizes.hidden


def _first_layer(facts: Facts) -> dict[str, tuple[int, ...]]:
    found = ((name_in_first_layer(name), tensor) for name, tensor in facts.model.tensors.items())
    return {name: tensor.shape for name, tensor in found if name is not None}
