"""The ops as Triton kernels: readable, autotuned, for NVIDIA and AMD GPUs alike.

They are a second implementation, independent of ``csrc/cuda``, in float16, bfloat16 or float32 with sums in
float32. Sizes, ranks and offsets need not be multiples of anything, but multiples of 8 are read in vectors.

Values that lie on the device (offsets, slots, ranks, ids, references) may be anything: no kernel reads or
writes out of bounds because of them. It leaves the rows of such a segment as they are, and gives such a token
-1 (look-up) or zeros (merge). These kernels have no fault word: nothing is raised.

Every call is a few launches on torch's current stream of the tensors' device. Nothing waits, and torch
allocates only outputs and the small tables of addresses, so that a CUDA graph can capture it, once a call of
the same shapes has compiled and tuned it. Tuned are tile rows, warps and stages, never the order in which a
kernel adds: where that hangs on the number of warps (the layer norms), the number comes from a table. A GPU
that has several matrix instructions may still round the products of high and of low tiles differently.

With ``TRITON_INTERPRET=1``, set before the first import, numpy runs them on CPU tensors. What that does not
show of a GPU: vector loads, races and shared memory; and its numerics differ in that

- products and sums of ``tl.dot`` are numpy's matmul in float32, in another order than a tensor core's;
- bfloat16 operands of ``tl.dot`` would be taken for integers, and conversions to bfloat16 would cut off
  instead of rounding: ``language.dot`` and ``language.rounded`` do both themselves there;
- subnormal bfloat16 values are read as other tiny values;
- exp, erf and the division are correctly rounded or nearly so, where a GPU's are off by some units in the
  last place of float32.
"""
