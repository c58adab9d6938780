// The inner loops of the CPU backend, compiled once per SIMD level from the same source (see kernels.inl).
//
// Hazard: what one of these files instantiates of a shared template, the linker may pick for the whole program, and a
// machine without AVX-512 would then run AVX-512 code. Hence the files of this folder that are compiled for one level
// include no header of the C++ library, and everything in them but their one table has internal linkage.
#pragma once

#include <stdint.h>

#include "common/data_type.h"

namespace hmi {


struct MergeSource {
  const void* row;
  DataType type;             // kFloat32, kFloat16, kInt8 or kCode
  float scale;               // what an int8 element counts
  const uint16_t* codebook;  // for kCode: halves [hidden_size / piece_size, kCodebookSize, piece_size]
  int piece_size;            // 4 or 8
};

struct MergeArguments {
  const MergeSource* sources;
  int num_sources;
  bool subtract_last;
  const float* position;
  const float* weight;
  const float* bias;
  float epsilon;
  int64_t hidden_size;
  float* output;
};

// outputs[num_rows, columns] from inputs[num_rows, depth] @ weights[depth, columns] + bias. Strides are of rows, in
// elements.
struct MatmulArguments {
  const float* inputs;
  int64_t input_stride;
  const float* weights;
  int64_t weight_stride;
  const float* bias;  // null for none
  float* outputs;
  int64_t output_stride;
  int64_t num_rows;
  int64_t depth;
  int64_t columns;
};

enum Activation : int32_t { kRelu, kGelu, kSilu, kGeluTanh, kTanh, kNumActivations, kIdentity = -1 };

// Every element is one chain of multiply-adds over depth, whatever the rows around it: a token's result does not depend
// on its neighbours, bit for bit.
struct SimdKernels {
  const char* name;
  // output = LayerNorm(sum of sources (the last one subtracted if so asked) + position)
  void (*merge_row)(const MergeArguments&);
  // outputs = activation(inputs @ weights + bias)
  void (*matmul_activate)(const MatmulArguments&, Activation);
  // outputs += scale * (inputs @ weights + bias)
  void (*matmul_accumulate)(const MatmulArguments&, float scale);
  // each row of values[num_rows, columns] = softmax(scale * row), in place
  void (*softmax_rows)(float* values, int64_t num_rows, int64_t columns, float scale);
};

extern const SimdKernels portable_kernels;
#if defined(__x86_64__)
extern const SimdKernels avx2_kernels;
extern const SimdKernels avx512_kernels;
#endif

}  // namespace hmi
