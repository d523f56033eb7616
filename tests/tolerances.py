"""The tolerances of tests, by level and dtype."""

OP_FP64 = 1e-10
"""Chunked op against the plain loop in fp64."""
OP_FP32 = 2e-5
"""Chunked op in fp32, where keys of 100 make logits of a few hundred."""
MODEL_FP32 = 2e-4
"""Logits of a model in fp32 for any cut of the prompt, and of a teacher against a window with all tokens."""
DRIFT_FP32 = 2e-4
"""Logits after up to 2,048 single steps in fp32, against fp64."""
FUSED_FP32 = 1e-5
"""Relative root mean square error of the fused kernels in fp32, against fp64."""
FUSED_BF16 = 5e-3
"""Relative root mean square error of the fused kernels with inputs in bf16 or fp16."""
