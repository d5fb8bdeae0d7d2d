"""Models of the package `transformers`, tiny and at random weights: each group as derived by hand, and all of them.

Widths: a stream of D, H neurons, one head of width 4, V words, L positions, one block. A norm whose output only linear
maps read is rescaled with them (D). Where it has a shift, biases undo that (D), and one number for each row of what
reads it: a constant along the axis that was normalised. What is written into a stream that only norms read may have any
mean: one number for each column and bias, word and position.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import params_of
from fibre import fibre
from torch import Tensor, nn
from torch.func import functional_call

import teleport_lite as tl
from teleport_lite.discovery.float64 import Float64
from teleport_lite.outputs import tensors_of

tf = pytest.importorskip("transformers")
D, H, V, L = 4, 5, 25, 5
HEAD = 4 * 4  # mixings of a head of width 4: queries with keys, or values with outputs
TOKENS = (6 * torch.arange(2 * L)).remainder(V).reshape(2, L)
SMALL = {"hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": H}
EXACT = {"layer_norm_eps": 1e-3}  # so large that the scale of what a norm reads is none of the exact symmetries
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 3}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # masks undo what shifts means

UNREAD = "a bucket that no distance falls into"
TIED = "a tied table is shifted where it is read and where it writes, by its bias"
SCALE = "one scale of two terms of a sum, undone behind it"
NORMED = "the scale of what is divided by its norm"
TABLE = "no group: each word of a table makes up for the gain and the shift of the norm behind it"


class Net(nn.Module):
    """The model, with positional arguments and some of what it returns."""

    def __init__(self, model: nn.Module, names: str, returned: str) -> None:
        super().__init__()
        self.model, self.names, self.returned = model, names.split(), returned.split()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        out = self.model(**dict(zip(self.names, inputs, strict=True)))
        return tuple(out[a][b] if b else out[a] for a, _, b in (name.partition(".") for name in self.returned))


class GCN(nn.Module):
    """Two graph convolutions, with degrees, on a fixed graph."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, H), nn.Linear(H, D), nn.Linear(D, 2)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x, n = input_ids, input_ids.shape[1]
        source = torch.cat([torch.arange(n), torch.arange(n), torch.arange(n - 1)])
        target = torch.cat([torch.arange(n), torch.arange(n).roll(1), torch.zeros(n - 1, dtype=torch.long)])
        degree = x.new_zeros(n).index_add(0, target, x.new_ones(len(target)))
        weight = (degree[source] * degree[target]).rsqrt()[:, None]
        for linear in (self.one, self.two):
            sent = x[:, source] @ linear.weight.T * weight
            where = target[None, :, None].expand(sent.shape)
            x = F.leaky_relu(sent.new_zeros(*x.shape[:2], sent.shape[2]).scatter_add(1, where, sent) + linear.bias)
        return {"logits": self.head(x.mean(1))}


@dataclass(frozen=True)
class Case:
    """A model, the dimensions of its groups by kind, and what is not found."""

    make: Callable[[], nn.Module]
    groups: dict[str, int]
    rest: int = 0
    why: str = ""
    inputs: tuple[Tensor, ...] = (TOKENS,)
    names: str = "input_ids"
    returned: str = "logits"
    seed: int = 0  # of weights at which the singular values have a gap, and each neuron is on and off


def causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    common = {"vocab_size": V, "max_position_embeddings": 8, "num_key_value_heads": 1, "head_dim": 4}
    common |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    return model(f"{name}ForCausalLM", f"{name}Config", **SMALL, **common, **options)


def model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, name)(getattr(tf, config)(**options))


def clip() -> nn.Module:
    text = {"vocab_size": V, "max_position_embeddings": L, "eos_token_id": V - 1, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 4, "patch_size": 2, "num_channels": 1}
    config = tf.CLIPConfig(text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=3)
    return tf.CLIPModel(config)


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


STREAM = {True: D * (D - 1) // 2, False: (D - 1) * (D - 2) // 2}  # rotations, behind RMS norms and LayerNorms
LLAMA = {  # the stream and two pairs that rotary positions turn; three norms, those pairs, and H gated neurons; a head
    "rotation": STREAM[True] + 2,
    "scaling": 3 * D + 2 + H,
    "mixing": HEAD,
}
# A block of a transformer with LayerNorms and biases everywhere: shifts of both norms, of keys, of values; rows of
# queries, keys, values and of the first layer; columns and biases that write into the stream.
BLOCK = 2 * D + 4 + 4 + (3 * 4 + H) + (4 + 1) + (H + 1)
CASES = {
    # what reads the last norm is tied to the table; positions have a mean, too
    "GPT-2": Case(
        model(
            "GPT2LMHeadModel", "GPT2Config", n_embd=D, n_layer=1, n_head=1, n_inner=H, vocab_size=V, n_positions=L,
            use_cache=False, bos_token_id=None, eos_token_id=None, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        ),
        {"scaling": 2 * D, "mixing": 2 * HEAD, "translation": BLOCK + L},
    ),
    # Only the last norm is read by linear maps alone (D). Types are shifted into positions (D), two types and L
    # positions have a mean. Two norms stand in BLOCK; the third has a shift and D rows, in the transform before the
    # output (2 D), and the fourth, in there, a shift that the last bias undoes (D).
    "BERT": Case(
        model(
            "BertForMaskedLM", "BertConfig", **SMALL, **EXACT, **STILL, vocab_size=V, max_position_embeddings=L,
            type_vocab_size=2,
        ),
        {"scaling": D, "mixing": 2 * HEAD, "translation": BLOCK + (D + 2 + L) + 3 * D},
        rest=1, why=TIED, inputs=(TOKENS, TOKENS % 2), names="input_ids token_type_ids",
    ),
    # The last norm is returned. The token and the bias of patches are shifted into positions (2 D); means of the token,
    # of the 4 pixels and the bias of a patch, and of positions.
    "ViT": Case(
        lambda: tf.ViTModel(tf.ViTConfig(**SMALL, **EXACT, image_size=4, patch_size=2, num_channels=1), False),
        {"scaling": 2 * D, "mixing": 2 * HEAD, "translation": BLOCK + 2 * D + (1 + 4 + 1 + L)},
        inputs=(images(1, 4, 4),), names="pixel_values", returned="last_hidden_state",
    ),
    "Llama": Case(causal("Llama"), LLAMA),
    "Mistral": Case(lambda: causal("Mistral", sliding_window=3)(), LLAMA),
    # a router's logits may all be shifted alike, by D numbers; neurons of each of three experts, and of a shared one
    "Mixtral": Case(
        causal("Mixtral", num_local_experts=3, num_experts_per_tok=2),
        {**LLAMA, "scaling": 3 * D + 2 + 3 * H, "translation": D},
    ),
    "Qwen2-MoE": Case(
        causal("Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=2),
        {**LLAMA, "scaling": 3 * D + 2 + 3 * 3 + 2, "translation": D},
    ),
    # gains of queries and keys, which do not turn with the pairs
    "Qwen3": Case(causal("Qwen3"), {**LLAMA, "rotation": STREAM[True]}),
    # the last norm is tied, so that the stream is not turned
    "Gemma": Case(causal("Gemma"), {**LLAMA, "rotation": 2, "scaling": 2 * D + 2 + H}),
    # Half of a head is turned: one pair, and two entries that are mixed and whose keys are shifted. Both branches write
    # into the stream at once, so that their biases undo each other (D); the words have means.
    "GPT-NeoX": Case(
        model(
            "GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, vocab_size=V, max_position_embeddings=8, use_cache=False,
            rotary_pct=0.5, hidden_dropout=0.0, attention_dropout=0.0,
        ),
        {
            "rotation": STREAM[False] + 1, "scaling": 3 * D + 1, "mixing": HEAD + 2 * 2, "shear": D,
            "translation": BLOCK - 4 + 2 + D + V,
        },
    ),
    # three attentions; six norms and two layers with a ReLU; the buckets of each of two tables are shifted alike
    "T5": Case(
        model(
            "T5ForConditionalGeneration", "T5Config", vocab_size=V, d_model=D, d_kv=4, d_ff=H, num_layers=1,
            num_decoder_layers=1, num_heads=1, relative_attention_num_buckets=4, relative_attention_max_distance=8,
            use_cache=False, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        ),
        {"mixing": 2 * 3 * HEAD, "scaling": 6 * D + 2 * H, "translation": 2},
        rest=1, why=UNREAD, inputs=(TOKENS, TOKENS.flip(1)), names="input_ids decoder_input_ids",
    ),
    # Keys have no bias (-4 in each block). The encoder ends in a norm that the keys and values of the attention across
    # read. That has a norm of its own (D), rows of its queries, a shift of values into a bias, and writes (4 + 1).
    "Whisper": Case(
        model(
            "WhisperForConditionalGeneration", "WhisperConfig", vocab_size=V, num_mel_bins=3, d_model=D,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1, dropout=0.0,
            encoder_ffn_dim=H, decoder_ffn_dim=H, max_source_positions=4, max_target_positions=L, use_cache=False,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        {
            "mixing": 2 * 3 * HEAD, "scaling": 6 * D,
            "translation": 2 * (BLOCK - 4) + L + (D + 2 * 4) + (D + 4 + 4 + 4 + 1),
        },
        inputs=(images(3, 8), TOKENS), names="input_features decoder_input_ids",
    ),
    # Two towers; the text's last norm is returned. The projections are turned together, and scaled inversely. Words or
    # the token are shifted into positions (D each); the vision's stream is returned, so that it is written with a mean
    # only where a norm stands before it: token, 4 pixels, positions.
    "CLIP": Case(
        clip,
        {
            "mixing": 4 * HEAD, "scaling": 5 * D + 2, "rotation": 3, "shear": D,
            "translation": (BLOCK + D + V + L) + (BLOCK - (4 + 1) - (H + 1) + D + (1 + 4 + L)) + 2,
        },
        inputs=(TOKENS, images(1, 4, 4)),
        names="input_ids pixel_values",
        returned="logits_per_image text_model_output.last_hidden_state vision_model_output.last_hidden_state",
    ),
    # Two norms and the gain of the layer. Means of the 8 pixels and the bias of a patch, and of the depthwise bias; two
    # shifts, and the rows of the 4 D neurons and of 3 classes.
    "ConvNeXt": Case(
        model(
            "ConvNextForImageClassification", "ConvNextConfig", **EXACT, num_channels=2, patch_size=2, num_stages=1,
            hidden_sizes=[D], depths=[1], image_size=8, num_labels=3,
        ),
        {"scaling": 3 * D, "translation": (8 + 1) + 1 + 2 * D + (4 * D + 3) + 4 * D + 1},
        inputs=(images(2, 8, 8),), names="pixel_values",
    ),
    # a norm, the channels of the convolution, three states; two ranks of the step
    "Mamba": Case(
        model(
            "MambaForCausalLM", "MambaConfig", vocab_size=V, hidden_size=D, state_size=3, num_hidden_layers=1,
            conv_kernel=2, expand=1, time_step_rank=2, use_cache=False,
        ),
        {"scaling": D + D + 3, "mixing": 2 * 2},
        rest=1, why=SCALE, seed=3,
    ),
    # In each of two blocks two norms, D channels of values, H neurons with a squared ReLU, and what attention writes
    # has a mean; so have words, and the norm behind them.
    "RWKV": Case(
        model(
            "RwkvForCausalLM", "RwkvConfig", vocab_size=V, hidden_size=D, attention_hidden_size=D, intermediate_size=H,
            num_hidden_layers=2, context_length=8, use_cache=False,
        ),
        {"scaling": 2 * (2 * D + D + H) + D, "shear": D, "translation": V + 1 + 2 * D},
        rest=D + D - 1, why=TABLE,
    ),
    "GCN": Case(GCN, {"scaling": H + D}, inputs=(images(5, 3),), seed=1),
}  # fmt: skip


def drawn(case: Case) -> tuple[Net, tuple[Tensor, ...]]:
    """The model at generic weights, in float64, and its inputs."""
    torch.manual_seed(case.seed)
    net = Net(case.make(), case.names, case.returned).eval().double()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net, tuple(x.double() if x.is_floating_point() else x for x in case.inputs)


def dims(symmetry: tl.Product) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for factor in symmetry.continuous:
        found[factor.group.kind] += factor.dim
    return dict(found)


def outputs(net: nn.Module, params: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad(), Float64():  # some models compute in float32 whatever they are given
        return torch.cat([t.reshape(-1) for t in tensors_of(functional_call(net, params, inputs))])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of counting, with grouped products
@pytest.mark.parametrize("name", CASES)
def test_groups_are_those_derived_by_hand_and_span_the_fibre(name):
    case = CASES[name]
    net, inputs = drawn(case)
    symmetry, params = tl.find_symmetries(net, inputs), params_of(net)
    assert dims(symmetry) == case.groups
    counted = fibre(net, inputs)
    assert counted.gap > 4
    assert symmetry.rank(params) + case.rest == counted.dim, case.why
    before, generator = outputs(net, params, inputs), torch.Generator().manual_seed(1)
    for _ in range(10):
        moved = symmetry.act(params, symmetry.sample(params, radius=0.5, generator=generator))
        assert float((outputs(net, moved, inputs) - before).abs().max() / before.abs().max()) < 1e-11


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_model_with_its_cache_in_float32(name):
    torch.manual_seed(0)
    model = CASES[name].make()
    model.config.use_cache = True
    before = copy.deepcopy(model.state_dict())
    assert dims(tl.find_symmetries(model, {"input_ids": TOKENS})) == CASES[name].groups
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_each_rest_has_a_reason():
    assert len(CASES) >= 16
    assert all(bool(case.rest) == bool(case.why) for case in CASES.values())
