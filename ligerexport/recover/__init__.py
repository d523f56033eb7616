"""Recovery: LoRA repairs what a conversion cost, by next-token prediction or by following the Transformer it came from.

`recipes` has the recipes, `data` and `packing` what is learned from, `phases` and `losses` what is minimised, `train`
the loop, `state` how it resumes; what it writes is in `ligerexport.adapter`. Only `recover` is public.
"""

from ligerexport.recover.run import recover as recover
