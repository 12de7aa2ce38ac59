"""DRT from its formulae: one text, loops over positions, heads and chunks; only weights are shared with the package.

Sources: DRT (ICML 2025), section 3; ALiBi (arXiv:2108.12409); RoPE (arXiv:2104.09864). What the paper leaves open
follows the config.
"""

import torch


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def decoder_norm(c, w, name, x):
    if c.norm == "rmsnorm":
        return rms_norm(x, w[f"{name}.weight"], c.rms_norm_eps)
    spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / (spread + c.rms_norm_eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def feed_forward(c, w, name, x):
    act = {"silu": lambda z: z * z.sigmoid(), "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2}[c.hidden_act]
    up = linear(w, f"{name}.mlp.up_proj", x)
    inner = act(linear(w, f"{name}.mlp.gate_proj", x)) * up if c.gated_mlp else act(up)
    return linear(w, f"{name}.mlp.down_proj", inner)


def rope(x_PD, theta, dtype=torch.float64):
    """Turn pairs (x_i, x_{i + d/2}) of position p by p * theta^(-2i/d), as complex numbers.

    `dtype` is that of theta^(-2i/d): in float32 the frequencies are those of every Llama.
    """
    half = x_PD.shape[-1] // 2
    angle = torch.arange(len(x_PD))[:, None] * (1 / theta ** (torch.arange(half, dtype=dtype) / half)).double()
    turned = torch.complex(x_PD[:, :half], x_PD[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], 1)


def self_attention(c, w, name, x_LD):
    """Position i sees i - w + 1 ... i, and the sinks; with ALiBi head h subtracts 2^(-8(h+1)/H) a step back."""
    d, H = c.head_dim, c.num_attention_heads
    q, k, v = (linear(w, f"{name}.self_attn.{part}_proj", x_LD) for part in "qkv")
    for x, part in ((q, "q"), (k, "k")):
        for h in range(x.shape[1] // d):
            head = x[:, h * d : h * d + d]
            if c.qk_norm:
                head = rms_norm(head, w[f"{name}.self_attn.{part}_norm.weight"], c.rms_norm_eps)
            if c.position_encoding == "rope":
                head = rope(head, c.rope_parameters["rope_theta"], torch.float32)
            x[:, h * d : h * d + d] = head
    out = torch.zeros_like(q)
    for i in range(len(x_LD)):
        first = 0 if c.sliding_window is None else max(0, i - c.sliding_window + 1)
        seen = [*range(min(c.num_sink_tokens, first)), *range(first, i + 1)]
        back = i - torch.tensor(seen)
        for h in range(H):
            g = h * c.num_key_value_heads // H
            slope = 2 ** (-8 * (h + 1) / H) if c.position_encoding == "alibi" else 0
            scores = k[seen, g * d : g * d + d] @ q[i, h * d : h * d + d] / d**0.5 - slope * back
            out[i, h * d : h * d + d] = scores.softmax(0) @ v[seen, g * d : g * d + d]
    return linear(w, f"{name}.self_attn.o_proj", out)


def encode_chunk(c, w, states_PD):
    """Return the landmark and the keys and values of one chunk."""
    d, S, eps = c.head_dim, c.chunk_size, c.encoder_rms_norm_eps
    x = rms_norm(states_PD, w["encoder.input_norm.weight"], c.rms_norm_eps)
    if c.landmark_source == "cls":
        x = torch.cat([x, w["encoder.cls"][None]])
    for n in range(c.num_encoder_layers):
        name = f"encoder.layers.{n}"
        normed = rms_norm(x, w[f"{name}.input_layernorm.weight"], eps)
        q, k, v = (normed @ w[f"{name}.{part}_proj.weight"].T for part in "qkv")
        mixed = torch.zeros_like(q)
        for h in range(c.num_attention_heads):
            own = slice(h * d, h * d + d)
            scores = rope(q[:, own], c.encoder_rope_theta) @ rope(k[:, own], c.encoder_rope_theta).T
            mixed[:, own] = (scores / d**0.5).softmax(-1) @ v[:, own]
        x = x + mixed @ w[f"{name}.o_proj.weight"].T
        x = x + feed_forward(c, w, name, rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps))
    x = rms_norm(x, w["encoder.norm.weight"], eps)
    landmark = x[:S].mean(0) if c.landmark_source == "mean" else x[S]
    return landmark, x[:S] @ w["encoder.k_proj.weight"].T, x[:S] @ w["encoder.v_proj.weight"].T


def retrieve(c, query_D, landmarks, bags, t):
    """Return the numbers and weights of the chunks that chunk t finds among those before it."""
    if c.retriever == "fixed":
        scores = [10 * torch.cosine_similarity(bags[t], bags[i], dim=0) for i in range(t)]
    else:
        scores = [query_D @ landmarks[i] / len(query_D) ** 0.5 for i in range(t)]
    best = sorted(range(t), key=lambda i: -scores[i])[: c.num_retrieved_chunks]
    return best, torch.stack([scores[i] for i in best]).softmax(0) if best else []


def cross_attention(c, w, name, x_D, memory, found, weights, place):
    """Attention of one position to the chunks that serve it; a softmax in each ("gca") or over all ("cca").

    `place` counts the layers that attend to chunks; with `keys_per_layer` each has its own part of every chunk.
    """
    d, H = c.head_dim, c.num_attention_heads
    q = rms_norm(x_D, w[f"{name}.cross_attn.norm.weight"], c.rms_norm_eps) @ w[f"{name}.cross_attn.q_proj.weight"].T
    out, one = torch.zeros_like(q), float(c.landmark_slot == "off_by_one")
    for h in range(H) if found else []:
        own, g = slice(h * d, h * d + d), h * c.num_key_value_heads // H
        g += place * c.num_key_value_heads if c.keys_per_layer else 0
        shared = slice(g * d, g * d + d)
        parts = [(memory[i][1][:, shared] @ q[own] / d**0.5).exp() for i in found]
        total = one + sum(part.sum() for part in parts)
        for i, part, weight in zip(found, parts, weights, strict=True):
            share = part / total if c.fusion == "cca" else weight * part / (one + part.sum())
            gate = w[f"{name}.cross_attn.gate"][h] if c.gated_retrieval else 1
            out[own] += gate * (share @ memory[i][2][:, shared])
    return out @ w[f"{name}.cross_attn.o_proj.weight"].T


def upper_layer(c, w, name, hidden_LD, memory, serving, place):
    """a = h + Attention(norm(h)); c = GCA(norm(a)); h' = a (or a + c, "stream") + SwiGLU(norm(a + c))."""
    a = hidden_LD + self_attention(c, w, name, decoder_norm(c, w, f"{name}.input_layernorm", hidden_LD))
    fused = a.clone()
    for i in range(len(a)):
        # what chunk t found serves chunk t + 1, what a token found itself
        found, weights = serving.get(i if c.retrieval_by == "token" else i // c.chunk_length - 1, ([], []))
        if place is not None:
            fused[i] += cross_attention(c, w, name, a[i], memory, found, weights, place)
    normed = decoder_norm(c, w, f"{name}.post_attention_layernorm", fused)
    return (a if c.residual == "bypass" else fused) + feed_forward(c, w, name, normed)


@torch.no_grad()
def brute_force_logits(model, ids: list[int]) -> torch.Tensor:
    """Return the next-token logits `[T, V]` of one text."""
    c, w = model.config, {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    rows, tokens = [], []
    for n, token in enumerate(ids):
        tokens.append(len(rows))
        rows.append(w["embed_tokens.weight"][token])
        if c.landmark_source == "token" and c.retrieval_groups and n % c.chunk_size == c.chunk_size - 1:
            rows.append(w["landmark"])
    hidden, P = torch.stack(rows), c.chunk_length
    if c.position_encoding == "learned":
        hidden = hidden + w["embed_positions.weight"][: len(hidden)]
    for n in range(c.num_lower_layers):
        name = f"layers.{n}"
        hidden = hidden + self_attention(c, w, name, decoder_norm(c, w, f"{name}.input_layernorm", hidden))
        normed = decoder_norm(c, w, f"{name}.post_attention_layernorm", hidden)
        hidden = hidden + feed_forward(c, w, name, normed)
    chunks = range(len(hidden) // P if c.retrieval_groups else 0)
    memory = [encode_chunk(c, w, hidden[t * P : t * P + P]) for t in chunks]
    bags = None
    if c.retriever == "fixed":
        S = c.chunk_size
        bags = [w["bag_of_tokens"][torch.tensor(ids[t * S : t * S + S])].sum(0) for t in chunks]
    layer, place = c.num_lower_layers, 0
    for group, count in enumerate(c.retrieval_groups):
        serving = {}
        by_token = c.retrieval_by == "token"
        for asks in range(len(hidden)) if by_token and chunks else chunks:
            t = asks // P if by_token else asks
            query = hidden[asks if by_token else t * P + P - 1]
            if c.retriever == "learned":
                query = rms_norm(query, w[f"query_norms.{group}.weight"], c.rms_norm_eps)
            serving[asks] = retrieve(c, query, [landmark for landmark, *_ in memory], bags, t)
        for within in range(count):
            attends = within < (c.cross_attention_layers or count)
            hidden = upper_layer(c, w, f"layers.{layer}", hidden, memory, serving, place if attends else None)
            layer, place = layer + 1, place + attends
    return decoder_norm(c, w, "norm", hidden)[tokens] @ w["lm_head.weight"].T
