"""Which language models of transformers can get a memory? A tiny random one of each is tried.

    python results/architectures.py                # all of them, minutes; writes architectures.md
    python results/architectures.py llama gpt2     # these alone; writes nothing

Each gets a memory in a middle block, reads a padded batch for the background, runs backward, and
generates the same with a cache and without. Or it is refused in one line."""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import eval as evaluation  # noqa: E402
import smf  # noqa: E402

SIZES = {  # what a config may call its sizes
    99: "vocab_size unpadded_vocab_size",
    64: "max_position_embeddings n_positions max_seq_len seq_length context_length",
    32: "hidden_size d_model n_embd dim word_embed_proj_dim embedding_size embed_dim lru_width "
        "kv_lora_rank q_lora_rank hidden_size_per_layer_input",
    48: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "shared_expert_intermediate_size moe_intermediate_size prefix_dense_intermediate_size",
    4: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers "
       "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
       "num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads "
       "linear_num_value_heads linear_num_key_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k n_group topk_group num_kv_heads",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim attention_head_dim "
       "linear_key_head_dim linear_value_head_dim global_head_dim",
    16: "mamba_d_state mamba_d_head", 0: "pad_token_id", 1: "bos_token_id", 3: "eos_token_id"}
OTHERWISE = ({}, {"num_key_value_heads": 4}, {"rotary_dim": 4}, {"num_key_value_heads": 1},
             {"attention_types": [[["global", "local"], 2]]})
SIZES = {name: size for size, names in SIZES.items() for name in names.split()}


def tiny_config(kind, otherwise):
    """The default config of a class, its sizes made small, and those of the configs within."""
    full = kind().to_dict()
    small = {name: size for name, size in (SIZES | otherwise).items() if name in full}
    within = {name: tiny_config(part, otherwise) for name, part in kind.sub_configs.items()
              if name in ("text_config", "decoder") and hasattr(part, "model_type")}
    return kind(**small, **within)


def tiny_model(kind, otherwise):
    """-> a random model, or None if it cannot be made small."""
    try:
        config = tiny_config(kind, otherwise)
        with torch.device("meta"):
            size = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
        if size > 2e8:
            return None
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        model(torch.ones(1, 9, dtype=torch.int64), use_cache=False)
        return model
    except Exception:  # of the library, on sizes that it did not expect
        return None


def attempt(model):
    """"passes", or why the model is refused. Anything else that it raises is a bug."""
    torch.manual_seed(0)
    examples = [smf.Example(torch.randint(4, 99, (n,)).tolist(), 4) for n in (9, 7, 12)]
    try:
        depth = len(smf.decoder_blocks(model))
        smf.retrofit(model, [depth // 2], alpha=1.0, n_keys=16, heads=2, k_dim=8, top_k=4)
    except smf.BadInput as error:
        return f"refused: {error}".replace(type(model).__name__, "it")
    memory, = smf.memories(model).values()
    smf.collect_background(model, [smf.collate(examples)])
    assert memory.background_counts.sum() == (9 + 7 + 12) * 2 * 4, "reads are miscounted"
    memory.values.requires_grad_(False)
    loss, reads = smf.backward(model, examples, 2)
    assert loss.isfinite() and all(dy.any() for *_, dy in reads.values()), "no gradient"
    ids = torch.tensor([examples[0].ids])
    new = [model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cache,
                          eos_token_id=None) for cache in (True, False)]
    assert torch.equal(*new), "the cache changes what is generated"
    return "passes"


def main(names):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)  # silent
    found = {}  # {what happened: model types}
    for name in tqdm(sorted(names or NAMES)):
        kind = transformers.CONFIG_MAPPING[name]
        model = next(filter(None, (tiny_model(kind, otherwise) for otherwise in OTHERWISE)), None)
        try:
            result = attempt(model) if model else "the script cannot make it small"
        except Exception as error:  # a bug
            result = f"FAILS: {error!r}"
        found.setdefault(result, []).append(name)
    table = evaluation.table({result: {"number": len(types), "model types": ", ".join(types)}
                              for result, types in sorted(found.items())},
                             f"transformers {transformers.__version__}")
    print(table)
    if not names:
        (ROOT / "results/architectures.md").write_text(table + "\n")


if __name__ == "__main__":
    smf.script(lambda: main(sys.argv[1:]))
