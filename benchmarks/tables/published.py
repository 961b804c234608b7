"""Times that others published for cases of ours, to show beside those that were measured."""

# NATTEN 0.20, its documentation's output of `natten.profiler` on an H100 (fp16, batch 1), ms: the
# whole op with its token permutation.
NATTEN_MS = {
    "na/flux/s1": 18.603,
    "na/flux/s16x16": 10.601,
    "na/hunyuan/s1": 84.417,
    "na/hunyuan/s16x8x8": 29.109,
}
