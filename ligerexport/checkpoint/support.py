"""Say whether a checkpoint is supported, from its config.json and the headers of its files alone."""

from __future__ import annotations

from ligerexport.checkpoint.checkpoint import CheckpointInfo
from ligerexport.checkpoint.convert import converted_config
from ligerexport.checkpoint.loading import dequantising
from ligerexport.errors import LigerError
from ligerexport.model.config import DEFAULT_PRESET, LigerConfig, get_preset


def support(info: CheckpointInfo) -> tuple[bool, str | None]:
    """Return whether a Transformer can be converted, or a converted checkpoint used, and the limits or the reason."""
    try:
        if info.quantised:
            dequantising(info)
        done = "liger" in info.config
        config = info.config if done else converted_config(dict(info.config), get_preset(DEFAULT_PRESET))
        liger = LigerConfig.from_dict(config["liger"])
    except LigerError as error:
        return False, error.message
    layers, limits = config["num_hidden_layers"], []
    if info.quantised or info.adapter:
        what = "dequantised" if info.quantised else "merged with the adapter beside them"
        limits.append(f"its weights are {what} first, in memory for the whole model")
    if liger.keep_window:
        limits.append(f"{len(liger.keep_window)} of {layers} layers keep the sliding window that they have")
    if liger.keep_softmax:
        limits.append(f"{len(liger.keep_softmax)} of {layers} layers keep softmax, whose memory grows with the text")
    if liger.celled:
        limits.append("no target has cells yet, so it runs in torch only")
    return True, ", and ".join(limits) or None
