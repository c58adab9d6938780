// Everything in one pass. A block first finds the rows of its tokens, one thread a token, while the layer norm's
// weights come into shared memory; then a token's threads load their 16 bytes (two vectors at most) of all its rows
// before they use any, sum in float32 registers, normalize there in two passes and store 16 bytes. Rows of any table
// are read once, from device memory or from pinned host memory alike.
#include "cuda/plot_merge.h"
#include "cuda/plot_merge_plan.h"
#include "cuda/plot_merge_rows.cuh"

namespace hmi::cuda {
namespace {

// As many elements of a row as 16 bytes of output hold. Of float32 rows beside 16-bit output these are 32 bytes; only
// the first half is loaded here, and the other half of each sector waits in the first-level cache for add_chunk: to
// keep both would double the registers that all rows take.
template <int kElements>
__device__ __forceinline__ uint4 load_chunk(const void* row, DataType type, int number) {
  const int bytes = kElements * size_of(type);
  const char* from = static_cast<const char*>(row) + number * bytes;
  if (bytes == 32) return load16(from);
  if (bytes == 16) return load16_once(from);
  if (bytes == 8) {
    const uint2 half = load8_once(from);
    return {half.x, half.y, 0, 0};
  }
  return {load4_once(from), 0, 0, 0};
}

// The pieces that the codes of such a chunk stand for, as halves. Codes of a row lie side by side, and so do a chunk's
// neighbors' among the threads; the codebooks, a few hundred KB, are read again and again.
template <int kElements>
__device__ __forceinline__ uint4 load_pieces(const void* row, const Codebook& codebook, int number) {
  const auto piece_of = [&](int code_number) {
    const unsigned code = load_byte(static_cast<const char*>(row) + code_number);
    return static_cast<const char*>(codebook.pieces) + (code_number * kCodebookSize + code) * codebook.piece_size * 2;
  };
  if (codebook.piece_size == 4) {
    constexpr int kCodes = kElements / 4;
    const uint2 first = load8(piece_of(number * kCodes));
    if constexpr (kCodes == 1) return {first.x, first.y, 0, 0};
    const uint2 second = load8(piece_of(number * kCodes + kCodes - 1));
    return {first.x, first.y, second.x, second.y};
  }
  if constexpr (kElements == 8) return load16(piece_of(number));
  const uint2 half = load8(static_cast<const char*>(piece_of(number / 2)) + number % 2 * 8);
  return {half.x, half.y, 0, 0};
}

template <class Element, int kCount>
__device__ __forceinline__ void add_elements(const uint4& bytes, float scale, float* sums) {
  Element elements[kCount];
  static_assert(sizeof(elements) <= sizeof(bytes));
  __builtin_memcpy(elements, &bytes, sizeof(elements));
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if constexpr (std::is_same_v<Element, int8_t>) {
      sums[e] += scale * static_cast<float>(elements[e]);
    } else {
      sums[e] += scale * to_float(elements[e]);
    }
  }
}

// What load_chunk or load_pieces gave of the row.
template <int kElements>
__device__ __forceinline__ void add_chunk(const uint4& chunk, const void* row, DataType type, int number, float scale,
                                          float (&sums)[kElements]) {
  switch (type) {
    case DataType::kFloat32:
      add_elements<float, 4>(chunk, scale, sums);
      if constexpr (kElements == 8) {
        add_elements<float, 4>(load16(static_cast<const char*>(row) + number * 32 + 16), scale, sums + 4);
      }
      return;
    case DataType::kFloat16:
      return add_elements<__half, kElements>(chunk, scale, sums);
    case DataType::kBfloat16:
      return add_elements<__nv_bfloat16, kElements>(chunk, scale, sums);
    case DataType::kInt8:
      return add_elements<int8_t, kElements>(chunk, scale, sums);
    case DataType::kCode:
      return add_elements<__half, kElements>(chunk, scale, sums);
  }
}

// Where a thread stands: its token among those at once, its chunks, and the shared sums of its token's warps.
struct Place {
  int group;
  int first_chunk;  // then first_chunk + stride
  int stride;
  int num_chunks;
  int warps_per_token;
};

// The sum over all threads of a token, the same in each launch. Every thread of the block takes part.
__device__ __forceinline__ float token_sum(const Place& place, float value, float* warp_sums) {
  value = warp_sum(value);
  if (place.warps_per_token == 1) return value;
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < place.warps_per_token; ++warp) {
    total += warp_sums[place.group * place.warps_per_token + warp];
  }
  return total;
}

// sums = the token's rows, all loaded before the first is used.
template <int kVectors, int kElements, int kSummands, bool kHasCodes>
__device__ __forceinline__ void sum_rows(const SummandRows<kSummands, kHasCodes>& rows, int token, const Place& place,
                                         float (&sums)[kVectors][kElements]) {
  uint4 chunks[kSummands][kVectors];
#pragma unroll
  for (int summand = 0; summand < kSummands; ++summand) {
    const void* row = rows.addresses[summand][token];
    const DataType type = rows.types[summand][token];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int number = place.first_chunk + v * place.stride;
      if (row == nullptr || number >= place.num_chunks) continue;
      if (kHasCodes && type == DataType::kCode) {
        chunks[summand][v] = load_pieces<kElements>(row, rows.codebooks.of(summand, token), number);
      } else {
        chunks[summand][v] = load_chunk<kElements>(row, type, number);
      }
    }
  }
#pragma unroll
  for (int summand = 0; summand < kSummands; ++summand) {
    const void* row = rows.addresses[summand][token];
    const DataType type = rows.types[summand][token];
    const float scale = rows.scales[summand][token];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int number = place.first_chunk + v * place.stride;
      if (row != nullptr && number < place.num_chunks) {
        add_chunk(chunks[summand][v], row, type, number, scale, sums[v]);
      }
    }
  }
}

struct Normalization {
  float mean;
  float factor;
};

// The variance comes from the deviations, in a second pass: a difference of squares would cancel.
template <int kVectors, int kElements>
__device__ __forceinline__ Normalization normalization(const PlotMergeArguments& a, const Place& place,
                                                       const float (&sums)[kVectors][kElements]) {
  HMI_SHARED(float, warp_sums, [2][kWarpSize]);
  float total = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kElements; ++e) total += sums[v][e];
  }
  const float mean = token_sum(place, total, warp_sums[0]) / static_cast<float>(a.hidden_size);
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (place.first_chunk + v * place.stride >= place.num_chunks) continue;
#pragma unroll
    for (int e = 0; e < kElements; ++e) squares += (sums[v][e] - mean) * (sums[v][e] - mean);
  }
  const float variance = token_sum(place, squares, warp_sums[1]) / static_cast<float>(a.hidden_size);
  return {mean, 1.0f / sqrtf(variance + a.layer_norm_epsilon)};
}

template <class Element, int kVectors, int kElements>
__device__ __forceinline__ void store_normalized(const PlotMergeArguments& a, const Place& place, int64_t t,
                                                 const uint4* layer_norm, const Normalization& norm, bool is_empty,
                                                 const float (&sums)[kVectors][kElements]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int number = place.first_chunk + v * place.stride;
    if (number >= place.num_chunks) continue;
    const Vector16<Element> weight = unpack<Element>(layer_norm[number]);
    const Vector16<Element> bias = unpack<Element>(layer_norm[place.num_chunks + number]);
    Vector16<Element> normalized;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const float value = (sums[v][e] - norm.mean) * norm.factor * to_float(weight.elements[e]);
      normalized.elements[e] = from_float<Element>(is_empty ? 0.0f : value + to_float(bias.elements[e]));
    }
    store16(static_cast<uint4*>(a.output) + t * place.num_chunks + number, pack(normalized));
  }
}

__device__ __forceinline__ void copy_layer_norm(const PlotMergeArguments& a, int num_chunks, uint4* to) {
  for (int number = threadIdx.x; number < num_chunks; number += blockDim.x) {
    cp_async16(to + number, static_cast<const uint4*>(a.layer_norm_weight) + number);
    cp_async16(to + num_chunks + number, static_cast<const uint4*>(a.layer_norm_bias) + number);
  }
  cp_async_commit();
}

// Thread i finds the rows of the block's token i.
template <int kWindow, bool kHasCodes>
__device__ __forceinline__ void find_rows(const PlotMergeArguments& a, int64_t first, int num_tokens,
                                          typename RowFinder<kWindow, kHasCodes>::Rows& rows) {
  const int token = threadIdx.x;
  const int begin = token - token % kWarpSize, end = begin + kWarpSize;
  if (begin >= num_tokens) return;
  const DeviceSequences sequences = {a.sequence_offsets, a.num_sequences, a.num_tokens};
  const int64_t last = first + (end < num_tokens ? end : num_tokens) - 1;
  const SequenceRange range = find_sequences_by_warp(sequences, first + begin, last);
  if (token >= num_tokens) return;
  RowFinder<kWindow, kHasCodes> finder(a, first + token, find_sequence(sequences, range, first + token, a.fault));
  finder.find(rows, token);
}

template <class Element, int kWindow, int kVectors, bool kHasCodes>
__global__ void __launch_bounds__(max_merge_threads(kVectors, sizeof(Element)), min_merge_blocks(kVectors))
    plot_merge_kernel(const __grid_constant__ PlotMergeArguments a, const MergePlan plan) {
  constexpr int kElements = 16 / sizeof(Element);
  using Rows = typename RowFinder<kWindow, kHasCodes>::Rows;
  HMI_DYNAMIC_SHARED(shared);
  HMI_SHARED(Rows, rows, [1]);
  uint4* const layer_norm = reinterpret_cast<uint4*>(shared);
  const int threads_per_token = plan.warps_per_token * kWarpSize;
  const Place place = {static_cast<int>(threadIdx.x) / threads_per_token,
                       static_cast<int>(threadIdx.x) % threads_per_token, threads_per_token,
                       a.hidden_size / kElements, plan.warps_per_token};
  const int64_t first = int64_t{blockIdx.x} * plan.tokens_at_once * plan.rounds;
  const int64_t left = a.num_tokens - first;
  const int num_tokens = left < plan.tokens_at_once * plan.rounds ? left : plan.tokens_at_once * plan.rounds;

  copy_layer_norm(a, place.num_chunks, layer_norm);
  find_rows<kWindow, kHasCodes>(a, first, num_tokens, rows[0]);
  cp_async_wait<0>();
  __syncthreads();
  // Groups without a token in the last round go along: the layer norm waits for all threads of the block.
  for (int round = 0; round * plan.tokens_at_once < num_tokens; ++round) {
    const int token = round * plan.tokens_at_once + place.group;
    const bool is_token = token < num_tokens;
    float sums[kVectors][kElements] = {};
    if (is_token) sum_rows(rows[0], token, place, sums);
    const Normalization norm = normalization(a, place, sums);
    if (is_token) store_normalized<Element>(a, place, first + token, layer_norm, norm, rows[0].is_empty(token), sums);
  }
  check_offsets_rise({a.sequence_offsets, a.num_sequences, a.num_tokens}, a.fault);
}

template <class Element, int kWindow, bool kHasCodes>
cudaError_t launch_plot_merge(const PlotMergeArguments& a, cudaStream_t stream) {
  if (a.hidden_size > kMaxMergeHiddenSize) return cudaErrorInvalidValue;
  const MergePlan plan = plan_merge(a.num_tokens, ceil_div(a.hidden_size, 16 / sizeof(Element)));
  const auto kernel = plan.vectors_per_lane == 1 ? plot_merge_kernel<Element, kWindow, 1, kHasCodes>
                                                 : plot_merge_kernel<Element, kWindow, 2, kHasCodes>;
  const dim3 grid(static_cast<unsigned>(ceil_div(a.num_tokens, int64_t{plan.tokens_at_once} * plan.rounds)));
  const dim3 block(static_cast<unsigned>(plan.tokens_at_once * plan.warps_per_token * kWarpSize));
  return launch(kernel, grid, block, 2 * a.hidden_size * sizeof(Element), stream, a, plan);
}

template <class Element, bool kHasCodes>
cudaError_t launch_plot_merge(const PlotMergeArguments& a, cudaStream_t stream) {
  return a.window == 2 ? launch_plot_merge<Element, 2, kHasCodes>(a, stream)
                       : launch_plot_merge<Element, 3, kHasCodes>(a, stream);
}

bool has_codes(const PlotMergeArguments& a) {
  for (int table = 0; table < a.num_row_tables; ++table) {
    if (a.row_tables[table].data_type == DataType::kCode) return true;
  }
  return false;
}

template <class Element>
cudaError_t launch_plot_merge(const PlotMergeArguments& a, cudaStream_t stream) {
  return has_codes(a) ? launch_plot_merge<Element, true>(a, stream) : launch_plot_merge<Element, false>(a, stream);
}

}  // namespace

cudaError_t plot_merge(const PlotMergeArguments& arguments, cudaStream_t stream) {
  switch (arguments.data_type) {
    case DataType::kFloat32:
      return launch_plot_merge<float>(arguments, stream);
    case DataType::kFloat16:
      return launch_plot_merge<__half>(arguments, stream);
    case DataType::kBfloat16:
      return launch_plot_merge<__nv_bfloat16>(arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace hmi::cuda
