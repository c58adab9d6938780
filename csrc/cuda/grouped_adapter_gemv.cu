// Adapters over segments of one or a few tokens. A block has one segment and one projection and takes the segment's
// tokens in groups of up to four, so that what it moves is the weights, once per group, at 16 bytes a thread and load.
//
// Enough segments to fill the machine: one launch. Inputs to shared memory, down product, inner state in shared memory,
// up product, outputs (or rows in shared memory, their layer norm, outputs).
// Few segments: two launches. The first has one block for each share of the depth and writes its sums to the workspace;
// the second has one block for each share of the columns, which adds the shares' sums in their order, whatever the
// order in which they came. With a layer norm it is one block a segment: a row's mean needs the whole row, and the row
// stays in shared memory instead of making two more trips.
#include "cuda/grouped_adapter_gemv.h"

#include "cuda/gemv_expand.cuh"
#include "cuda/gemv_layer_norm.cuh"
#include "cuda/gemv_shrink.cuh"

namespace hmi::cuda {
namespace {

// The block's segment and projection; false if there is nothing to do.
template <class Element>
__device__ __forceinline__ bool load_work(const GroupedAdapterArguments& arguments, bool layer_norm_is_work,
                                          Segment& segment, AdapterSlot<Element>& slot) {
  if (!load_segment(arguments, blockIdx.x, segment) || segment.begin == segment.end) return false;
  const SlotState state = load_slot(arguments, segment, blockIdx.y, slot);
  return state == SlotState::kReady || (state == SlotState::kNothing && layer_norm_is_work);
}

template <int kTokens>
__device__ __forceinline__ TokenGroup token_group(const Segment& segment, int64_t first) {
  return {first, static_cast<int>(segment.end - first < kTokens ? segment.end - first : kTokens)};
}

// Lane u of warp j has the bias of column 8 u + j, as sum_partials has its sum.
template <class Element>
__device__ __forceinline__ float load_down_bias(const AdapterSlot<Element>& slot) {
  const int column = threadIdx.x % kWarpSize * kGemvUnit + threadIdx.x / kWarpSize;
  return slot.down_bias != nullptr && column < slot.rank ? to_float(slot.down_bias[column]) : 0.0f;
}

template <class Element, int kTokens>
__device__ __forceinline__ void shrink_group(const GroupedAdapterArguments& arguments,
                                             const AdapterSlot<Element>& slot, const TokenGroup& group,
                                             const GemvShared<Element, kTokens>& shared) {
  const DepthRange depth{0, arguments.input_size};
  start_inputs(arguments, group, depth, shared);
  const float bias = load_down_bias(slot);
  const ShrinkPlace place(slot.rank);
  multiply_inputs(slot, place, depth, shared);
  __syncthreads();
  sum_partials(place, shared, [&](float sum) { return finish_inner(slot, sum, bias); });
}

template <class Element, int kTokens>
__global__ void __launch_bounds__(kGemvThreads, 2)
    fused_kernel(const GroupedAdapterArguments arguments) {
  HMI_DYNAMIC_SHARED(bytes);
  const GemvShared<Element, kTokens> shared(bytes);
  const bool has_layer_norm = arguments.layer_norm_weight != nullptr;
  const int projection = blockIdx.y;
  Segment segment;
  AdapterSlot<Element> slot;
  if (!load_work(arguments, has_layer_norm, segment, slot)) return;
  const int output_size = arguments.output_sizes[projection];
  const ColumnRange columns{0, output_size / kGemvUnit};
  const ExpandPlace place(columns, slot.rank);
  for (int64_t first = segment.begin; first < segment.end; first += kTokens) {
    const TokenGroup group = token_group<kTokens>(segment, first);
    if (first != segment.begin) __syncthreads();  // the group before has left shared.rows
    if (slot.rank > 0) shrink_group(arguments, slot, group, shared);
    WeightStream<Element> weights = up_stream(slot, place, place.unit, columns, output_size);
    __syncthreads();
    expand(arguments, projection, slot, group, columns, place, weights, shared);
    if (!has_layer_norm) continue;
    __syncthreads();
    layer_norm_rows(arguments, group, shared);
  }
}

static_assert(kMaxRank <= kGemvThreads, "shrink_kernel's last step gives each column a thread");

// Where the sums of a token's share of the depth lie in the workspace [projections, tokens, splits, max_rank].
__device__ __forceinline__ float* partial_sums(const GroupedAdapterArguments& arguments, int64_t token, int split,
                                               int splits) {
  const int64_t row = (blockIdx.y * arguments.num_tokens + token) * splits + split;
  return arguments.workspace + row * arguments.max_rank;
}

template <class Element, int kTokens>
__global__ void __launch_bounds__(kGemvThreads, 2)
    shrink_kernel(const GroupedAdapterArguments arguments) {
  HMI_DYNAMIC_SHARED(bytes);
  const GemvShared<Element, kTokens> shared(bytes);
  const int split = blockIdx.z, splits = gridDim.z;
  Segment segment;
  AdapterSlot<Element> slot;
  if (!load_work(arguments, false, segment, slot)) return;
  const int units = arguments.input_size / kGemvUnit, begin = units * split / splits;
  const DepthRange depth{begin * kGemvUnit, (units * (split + 1) / splits - begin) * kGemvUnit};
  const ShrinkPlace place(slot.rank);
  for (int64_t first = segment.begin; first < segment.end; first += kTokens) {
    const TokenGroup group = token_group<kTokens>(segment, first);
    start_inputs(arguments, group, depth, shared);
    multiply_inputs(slot, place, depth, shared);
    __syncthreads();
    sum_partials(place, shared, [](float sum) { return sum; });
    __syncthreads();
    for (int token = 0; token < group.tokens; ++token) {
      float* const sums = partial_sums(arguments, first + token, split, splits);
      const int column = threadIdx.x;
      if (column < slot.rank) sums[column] = shared.inner_at(token, column);
    }
  }
}

// From the workspace to shared.inner; each warp has columns of one token.
template <class Element, int kTokens>
__device__ __forceinline__ void add_splits(const GroupedAdapterArguments& arguments, const AdapterSlot<Element>& slot,
                                           const TokenGroup& group, int splits,
                                           const GemvShared<Element, kTokens>& shared) {
  const int warp = threadIdx.x / kWarpSize, token = warp % kTokens;
  if (token >= group.tokens) return;
  const float* const sums = partial_sums(arguments, group.first + token, 0, splits);
  const int first = warp / kTokens * kWarpSize + threadIdx.x % kWarpSize;
  for (int column = first; column < slot.rank; column += kGemvThreads / kTokens) {
    const float bias = slot.down_bias != nullptr ? to_float(slot.down_bias[column]) : 0.0f;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) sum += sums[int64_t{split} * arguments.max_rank + column];
    shared.inner_at(token, column) = finish_inner(slot, sum, bias);
  }
}

template <class Element, int kTokens>
__global__ void __launch_bounds__(kGemvThreads, 2)
    expand_kernel(const GroupedAdapterArguments arguments, const int splits) {
  HMI_DYNAMIC_SHARED(bytes);
  const GemvShared<Element, kTokens> shared(bytes);
  const bool has_layer_norm = arguments.layer_norm_weight != nullptr;
  const int projection = blockIdx.y;
  Segment segment;
  AdapterSlot<Element> slot;
  if (!load_work(arguments, has_layer_norm, segment, slot)) return;
  const int output_size = arguments.output_sizes[projection];
  const int units = output_size / kGemvUnit, chunks = gridDim.z, chunk = blockIdx.z;
  const ColumnRange columns{units * chunk / chunks, units * (chunk + 1) / chunks};
  if (columns.begin == columns.end) return;
  const ExpandPlace place(columns, slot.rank);
  for (int64_t first = segment.begin; first < segment.end; first += kTokens) {
    const TokenGroup group = token_group<kTokens>(segment, first);
    WeightStream<Element> weights = up_stream(slot, place, columns.begin + place.unit, columns, output_size);
    if (first != segment.begin) __syncthreads();  // the group before has left shared memory
    add_splits(arguments, slot, group, splits, shared);
    __syncthreads();
    expand(arguments, projection, slot, group, columns, place, weights, shared);
    if (!has_layer_norm) continue;
    __syncthreads();
    layer_norm_rows(arguments, group, shared);
  }
}

template <class Element, int kTokens>
cudaError_t launch_splits(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  const unsigned segments = static_cast<unsigned>(arguments.num_segments);
  const unsigned projections = static_cast<unsigned>(arguments.num_projections);
  const int64_t most_depth = ceil_div(arguments.input_size / kGemvUnit, plan.splits) * kGemvUnit;
  const cudaError_t error =
      launch(shrink_kernel<Element, kTokens>, dim3(segments, projections, plan.splits), dim3(kGemvThreads),
             gemv_shared_bytes(kTokens, most_depth), stream, arguments);
  if (error != cudaSuccess) return error;
  const int64_t row = arguments.layer_norm_weight != nullptr ? arguments.output_sizes[0] : 0;
  return launch(expand_kernel<Element, kTokens>, dim3(segments, projections, plan.column_chunks), dim3(kGemvThreads),
                gemv_shared_bytes(kTokens, row), stream, arguments, plan.splits);
}

template <class Element, int kTokens>
cudaError_t launch_groups(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  if (plan.launches > 1) return launch_splits<Element, kTokens>(arguments, plan, stream);
  const dim3 grid(static_cast<unsigned>(arguments.num_segments), static_cast<unsigned>(arguments.num_projections));
  return launch(fused_kernel<Element, kTokens>, grid, dim3(kGemvThreads),
                gemv_shared_bytes(kTokens, arguments.input_size), stream, arguments);
}

template <class Element>
cudaError_t launch_elements(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  switch (plan.group_tokens) {
    case 1:
      return launch_groups<Element, 1>(arguments, plan, stream);
    case 2:
      return launch_groups<Element, 2>(arguments, plan, stream);
    case 4:
      return launch_groups<Element, 4>(arguments, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_adapter_gemv(const GroupedAdapterArguments& arguments, const AdapterPlan& plan,
                                cudaStream_t stream) {
  switch (arguments.data_type) {
    case DataType::kFloat16:
      return launch_elements<__half>(arguments, plan, stream);
    case DataType::kBfloat16:
      return launch_elements<__nv_bfloat16>(arguments, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace hmi::cuda
