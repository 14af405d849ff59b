"""The same model built from transformers' modules, as one would do without this project.

lab.bench compares ours with it; needs transformers 5 (pip install transformers).

    CLIPVisionModel -> Linear, GELU, Linear -> masked_scatter into the token embeddings, as
    transformers' Llava does -> PhiForCausalLM, StableLmForCausalLM or LlamaForCausalLM

Sparse blocks follow its MixtralSparseMoeBlock: fp32 softmax, top-k, gates rescaled, a loop over
the experts that get tokens, index_add; experts and meta expert are the decoder's own MLPs.

Left as the library has it: attention (sdpa), activations, logits and loss of every position,
padding, which is routed too (its blocks do not pass the mask to an FFN).
In its favour: CLIP's unused last layer is not built; the frozen tower and projector keep no graph;
generation does not test for the end token.

Shapes: B batch, T positions, P patches, W tower width, D d_model, N = B*T, E experts, k experts per
token, R tokens routed to one expert.
"""

import copy

import torch
from torch import Tensor, nn

from config import IMAGE_ID, DecoderConfig, UserError, VisionConfig
from data import Batch
from engine.published import clip_table, decoder_table, slots
from lab.convert import publish
from model import MedMoE, sparse_layers

try:
    import transformers
except ImportError as error:
    raise UserError("lab.assembled compares with transformers: pip install transformers") from error


class SparseMLP(nn.Module):
    """A router, E copies of an MLP that it chooses among, and the MLP itself, always on."""

    def __init__(self, mlp: nn.Module, d_model: int, n_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(d_model, n_experts)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(n_experts))
        self.meta = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        rows = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # our routers use fp32 as well
            probs = self.gate(rows.float()).softmax(dim=-1)  # (N, E)
        top_p, top_e = probs.topk(self.top_k, dim=-1)  # both (N, k)
        if self.top_k > 1:
            top_p = top_p / top_p.sum(dim=-1, keepdim=True)
        with torch.no_grad():
            routed = nn.functional.one_hot(top_e, len(self.experts)).permute(2, 1, 0)  # (E, k, N)
            used = routed.sum(dim=(1, 2)).nonzero().flatten().tolist()
        y = self.meta(rows)
        for e in used:
            place, row = torch.where(routed[e])  # both (R,)
            out = self.experts[e](rows[row]) * top_p[row, place, None]
            y.index_add_(0, row, out.to(y.dtype))
        return y.view_as(x)


def their_vision(config: VisionConfig) -> nn.Module:
    """Without its last layer: the last hidden state is then the published hidden_states[-2]."""
    sizes = transformers.CLIPVisionConfig(
        image_size=config.image_size, patch_size=config.patch_size, hidden_size=config.width,
        num_hidden_layers=config.n_layers - 1, num_attention_heads=config.n_heads,
        intermediate_size=config.d_ff,
    )  # fmt: skip
    return transformers.CLIPVisionModel(sizes)


def their_decoder(config: DecoderConfig) -> nn.Module:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    sizes = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "intermediate_size": config.d_ff, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "max_position_embeddings": config.max_len, "tie_word_embeddings": config.tied,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if config.family == "llama":
        sizes |= {"rms_norm_eps": config.norm_eps, "rope_parameters": rope}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    rope["partial_rotary_factor"] = config.rotary_dim * config.n_heads / config.d_model
    sizes |= {"layer_norm_eps": config.norm_eps, "rope_parameters": rope}
    if config.family == "phi":
        sizes["resid_pdrop"] = config.dropout
        return transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))
    sizes |= {"hidden_dropout": config.dropout, "use_qkv_bias": True}
    return transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes))


class Assembled(nn.Module):
    """A sparse model of ours, weights copied, in transformers' modules; experts and meta learn."""

    def __init__(self, ours: MedMoE):
        super().__init__()
        config, moe = ours.config, ours.config.moe
        self.vision = their_vision(config.vision)
        width, d_model = config.vision.width, config.decoder.d_model
        self.projector = nn.Sequential(
            nn.Linear(width, d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )
        self.decoder = their_decoder(config.decoder)
        for layer in sparse_layers(config, moe):
            block = self.decoder.model.layers[layer]
            block.mlp = SparseMLP(block.mlp, d_model, moe.n_experts, moe.top_k)
        copy_weights(ours, self)
        for name, param in self.named_parameters():
            param.requires_grad_(".mlp.experts." in name or ".mlp.meta." in name)

    def embed(self, batch: Batch) -> Tensor:
        """(B, T, D): token embeddings, patches where they belong."""
        is_patch = batch.ids == IMAGE_ID  # (B, T)
        x = self.decoder.get_input_embeddings()(batch.ids.masked_fill(is_patch, 0))
        with torch.no_grad():
            states = self.vision(batch.images).last_hidden_state  # (n_images, P + 1, W)
            patches = self.projector(states[:, 1:])  # (n_images, P, D)
        return x.masked_scatter(is_patch[..., None], patches.to(x.dtype))

    def loss(self, batch: Batch) -> Tensor:
        """() mean cross-entropy of the supervised tokens."""
        return self.decoder(
            inputs_embeds=self.embed(batch), attention_mask=batch.mask.long(),
            labels=batch.labels, use_cache=False,
        ).loss  # fmt: skip

    @torch.no_grad()
    def generate(self, batch: Batch, max_new: int) -> Tensor:
        """(B, max_new) greedy tokens; batch is padded on the left."""
        return self.decoder.generate(
            inputs_embeds=self.embed(batch), attention_mask=batch.mask.long(),
            do_sample=False, max_new_tokens=max_new, use_cache=True,
        )  # fmt: skip


def copy_weights(ours: MedMoE, theirs: Assembled) -> None:
    """Every tensor by its published name; what transformers has no name for, by SparseMLP's."""
    config = ours.config
    tower = publish(slots(ours, "vision."), clip_table(config.vision), torch.float32)
    tower = {name.removeprefix("vision_model."): t for name, t in tower.items()}
    theirs.vision.load_state_dict(theirs.vision.state_dict() | tower)  # its last norm is not used
    theirs.projector[0].load_state_dict(ours.projector.fc1.state_dict())
    theirs.projector[2].load_state_dict(ours.projector.fc2.state_dict())
    table = {"model.layers.{}.mlp.gate.*": "decoder.blocks.{}.mlp.router.proj.*"}
    for name, our_name in decoder_table(config.decoder).items():
        table[name] = our_name
        if ".mlp." in name:  # a dense FFN's name; of experts and meta expert it is longer
            for place, our_place in (("experts.{}", "experts[{}]"), ("meta", "meta")):
                deeper = name.replace(".mlp.", f".mlp.{place}.")
                table[deeper] = our_name.replace(".mlp.", f".mlp.{our_place}.")
    decoder = publish(slots(ours, "decoder.", by_expert=True), table, torch.float32)
    if config.decoder.tied:
        decoder["lm_head.weight"] = decoder["model.embed_tokens.weight"]
    theirs.decoder.load_state_dict(decoder)
