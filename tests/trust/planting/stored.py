"""Faults in which stored weights differ from the checkpoint's."""

from __future__ import annotations

from typing import Any

import numpy as np

from ligerexport.exporters.verify.verify import prompt_ids
from planting.table import ALL, AT, ONNX, Site, fault


@fault("file")
def weights_of_two_layers_swapped(site: Site) -> None:
    one, other = (site.of_layer("mlp.down_proj.weight", layer) for layer in (AT, AT + 1))
    one[:], other[:] = other.copy(), one.copy()


@fault("file")
def a_square_matrix_transposed(site: Site) -> None:
    matrix = site.of_layer("self_attn.o_proj.weight")
    matrix[:] = matrix.T.copy()


@fault("file")
def one_sign_flipped(site: Site) -> None:
    matrix = site.of_layer("self_attn.v_proj.weight")
    matrix[np.unravel_index(np.abs(matrix).argmax(), matrix.shape)] *= -1


@fault("file")
def one_element_one_unit_in_the_last_place(site: Site) -> None:
    matrix = site.of_layer("mlp.up_proj.weight")
    matrix[0, 0] = np.nextafter(matrix[0, 0], np.float32(np.inf))


@fault("file")
def weights_of_a_layer_rounded_to_fp16(site: Site) -> None:
    for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        matrix = site.of_layer(f"{name}.weight")
        matrix[:] = matrix.astype(np.float16)


@fault("file")
def weight_of_a_norm(site: Site) -> None:
    one, other = (site.of_layer(f"{x}_layernorm.weight") for x in ("input", "post_attention"))
    one[:] = other


@fault("file", None)
def weight_of_the_last_norm(site: Site) -> None:
    site.stored("model.norm.weight")[0] *= 1.01


@fault("file", None)
def embedding_of_a_token_that_no_text_has(site: Site) -> None:
    seen = prompt_ids(site.spec)
    unseen = next(i for i in range(site.spec.vocab_size) if i not in seen)
    site.stored("model.embed_tokens.weight")[unseen] *= -1


@fault("file")
def a_kv_head_with_the_queries_of_another(site: Site) -> None:
    """The columns of the output projection are exchanged too, so only the KV head is wrong."""
    spec = site.spec
    first, second = (slice(h * spec.head_dim, (h + 1) * spec.head_dim) for h in (0, spec.q_heads // spec.kv_heads))
    for rows in site.of_layer("self_attn.q_proj.weight"), site.of_layer("self_attn.o_proj.weight").T:
        rows[first], rows[second] = rows[second].copy(), rows[first].copy()


@fault("file", presets=("foresight", "evicted"))
def weight_of_the_learned_score(site: Site) -> None:
    site.of_layer("self_attn.score_proj.weight")[1] *= -1


@fault("file", presets=("foresight", "evicted"))
def bias_of_the_learned_score(site: Site) -> None:
    site.of_layer("self_attn.score_proj.bias")[1] += 0.01


@fault("file", presets=("liger", "memory"), family="qwen2")
def bias_of_queries_missing(site: Site) -> None:
    site.of_layer("self_attn.q_proj.bias")[:] = 0


@fault("file", presets=("liger", "memory"), family="qwen2")
def bias_of_keys_missing(site: Site) -> None:
    site.of_layer("self_attn.k_proj.bias")[:] = 0


@fault("file", presets=("liger", "memory"), family="qwen2")
def bias_of_values_missing(site: Site) -> None:
    site.of_layer("self_attn.v_proj.bias")[:] = 0


int4: dict[str, Any] = {"presets": ("memory", "evicted"), "lowerings": ONNX, "weights": "int4"}
BLOCKED = "mlp.gate_proj.weight"


@fault("file", **int4)
def a_zero_point_off_by_one(site: Site) -> None:
    site.of_layer(f"{BLOCKED}_zero_point").flat[0] ^= 1


@fault("file", **int4)
def scales_of_two_blocks_swapped(site: Site) -> None:
    scale = site.of_layer(f"{BLOCKED}_scale").reshape(-1)
    scale[:2] = scale[1::-1].copy()


@fault("file", **int4)
def two_codes_of_each_byte_exchanged(site: Site) -> None:
    codes = site.of_layer(BLOCKED).reshape(-1)[:16]
    codes[:] = codes << 4 | codes >> 4


@fault("file", **int4)
def one_code_of_four_bits_off_by_one(site: Site) -> None:
    site.of_layer(BLOCKED).flat[0] ^= 1


@fault("file", **int4 | {"weights": "int8"})
def one_code_of_eight_bits_off_by_one(site: Site) -> None:
    site.of_layer(BLOCKED).flat[0] ^= 1


@fault("file", **int4 | {"weights": "fp16", "lowerings": ALL})
def one_half_one_unit_in_the_last_place(site: Site) -> None:
    site.of_layer(BLOCKED).view(np.uint16).flat[0] ^= 1
