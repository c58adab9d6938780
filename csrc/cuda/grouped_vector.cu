// One pass over the rows, in place. A block has a tile of one segment's rows and up to 1,024 columns; each thread reads
// 16 bytes of the slot's vector once, keeps them, and goes down the rows of the tile with them, four rows under way.
#include "cuda/grouped_vector.h"

#include <algorithm>

#include "cuda/segments.cuh"

namespace hmi::cuda {
namespace {

constexpr int kUnit = 8;  // 16-bit elements in 16 bytes
constexpr int kMaxThreads = 128;
constexpr int kRowsUnderWay = 4;

// Rows of a tile by tokens of the call: enough blocks for a whole machine, and beyond that fewer readings of the
// vectors (1 / (2 rows) of the traffic). Derived, not measured.
struct RowsOfTile {
  int64_t max_tokens;
  int rows;
};
constexpr RowsOfTile kRowsOfTile[] = {{1024, 4}, {4096, 8}, {INT64_MAX, 16}};

int tile_rows_for(int64_t num_tokens) {
  const RowsOfTile* entry = kRowsOfTile;
  while (num_tokens > entry->max_tokens) ++entry;
  return entry->rows;
}

// The vector of the segment's slot, or null: none, or a fault, of which one thread is heard.
template <class Element>
__device__ __forceinline__ const Element* load_vector(const GroupedVectorArguments& arguments, int64_t segment) {
  const bool reports = threadIdx.x == 0;
  const int64_t slot = arguments.segment_slots[segment];
  if (slot == -1) return nullptr;
  if (slot < 0 || slot >= arguments.num_slots) {
    if (reports) report_fault(arguments.fault, fault_word(Fault::kSegmentSlots, segment));
    return nullptr;
  }
  const int64_t offset = arguments.slot_offsets[slot];
  if (offset == -1) return nullptr;
  if (offset < 0 || offset > arguments.arena_size - arguments.hidden_size || offset % kUnit != 0) {
    if (reports) report_fault(arguments.fault, fault_word(Fault::kSlotOffsets, slot));
    return nullptr;
  }
  return static_cast<const Element*>(arguments.arena) + offset;
}

template <class Element, VectorOperation kOperation>
__device__ __forceinline__ uint4 apply(const uint4& bytes, const Vector16<Element>& vector) {
  Vector16<Element> values = unpack<Element>(bytes);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const float value = to_float(values.elements[j]), with = to_float(vector.elements[j]);
    values.elements[j] = from_float<Element>(kOperation == VectorOperation::kScale ? value * with : value + with);
  }
  return pack(values);
}

template <class Element, VectorOperation kOperation>
__global__ void __launch_bounds__(kMaxThreads)
    vector_kernel(const GroupedVectorArguments arguments, const int tile_rows) {
  const SegmentTile tile = find_segment_tile(arguments.segment_offsets, arguments.num_segments, arguments.num_tokens,
                                             blockIdx.x, tile_rows, arguments.fault);
  if (tile.segment < 0) return;
  const Element* const vector_start = load_vector<Element>(arguments, tile.segment);
  const int column = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kUnit;
  if (vector_start == nullptr || column >= arguments.hidden_size) return;

  const Vector16<Element> vector = unpack<Element>(load16(vector_start + column));
  Element* const first = static_cast<Element*>(arguments.hidden_states) + tile.row * arguments.stride + column;
  for (int row = 0; row < tile.rows; row += kRowsUnderWay) {
    uint4 values[kRowsUnderWay];
#pragma unroll
    for (int i = 0; i < kRowsUnderWay; ++i) {
      if (row + i < tile.rows) values[i] = load16_changing(first + (row + i) * arguments.stride);
    }
#pragma unroll
    for (int i = 0; i < kRowsUnderWay; ++i) {
      if (row + i >= tile.rows) break;
      store16(first + (row + i) * arguments.stride, apply<Element, kOperation>(values[i], vector));
    }
  }
}

template <class Element, VectorOperation kOperation>
cudaError_t launch_vector(const GroupedVectorArguments& arguments, cudaStream_t stream) {
  const int tile_rows = tile_rows_for(arguments.num_tokens);
  const int64_t tiles = num_segment_tiles(arguments.num_tokens, arguments.num_segments, tile_rows);
  // Equal shares of the columns, in whole warps.
  const int64_t units = arguments.hidden_size / kUnit;
  const int64_t chunks = ceil_div(units, kMaxThreads);
  const int64_t threads = ceil_div(ceil_div(units, chunks), kWarpSize) * kWarpSize;
  return launch(vector_kernel<Element, kOperation>, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(chunks)),
                dim3(static_cast<unsigned>(threads)), 0, stream, arguments, tile_rows);
}

template <class Element>
cudaError_t launch_operation(const GroupedVectorArguments& arguments, cudaStream_t stream) {
  return arguments.operation == VectorOperation::kScale
             ? launch_vector<Element, VectorOperation::kScale>(arguments, stream)
             : launch_vector<Element, VectorOperation::kAdd>(arguments, stream);
}

}  // namespace

cudaError_t grouped_vector(const GroupedVectorArguments& arguments, cudaStream_t stream) {
  if (arguments.num_tokens == 0 || arguments.num_segments == 0 || arguments.hidden_size == 0) return cudaSuccess;
  switch (arguments.data_type) {
    case DataType::kFloat16:
      return launch_operation<__half>(arguments, stream);
    case DataType::kBfloat16:
      return launch_operation<__nv_bfloat16>(arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace hmi::cuda
