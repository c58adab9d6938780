// Both kernels give a block one 64 x 64 tile of a result and take it through its whole depth on tensor cores: of the
// product, a tile of one segment's rows; of the gradient, a tile of one slot's matrix, over all of the slot's tokens.
#include "cuda/grouped_product.h"

#include "cuda/adapter_plan.h"
#include "cuda/segments.cuh"
#include "cuda/tile_product.cuh"

namespace hmi::cuda {
namespace {

struct SlotMatrix {
  int64_t offset;
  int32_t rows;  // 0: nothing to do
  int32_t columns;
};

// Checked before it is followed; one thread of the block is heard. The same answer for every thread of the block.
__device__ __forceinline__ SlotMatrix load_matrix(const SlotMatrices& slots, int64_t slot, int64_t most_rows,
                                                  int64_t most_columns, int multiple) {
  const SlotMatrix matrix{slots.slot_offsets[slot], slots.slot_rows[slot], slots.slot_columns[slot]};
  if (matrix.rows == 0 || matrix.columns == 0) return {0, 0, 0};
  const bool has_size = matrix.rows > 0 && matrix.rows <= most_rows && matrix.rows % multiple == 0 &&
                        matrix.columns > 0 && matrix.columns <= most_columns && matrix.columns % multiple == 0;
  if (!has_size) {
    if (threadIdx.x == 0) report_fault(slots.fault, fault_word(Fault::kSlotMatrices, slot));
    return {0, 0, 0};
  }
  const int64_t size = int64_t{matrix.rows} * matrix.columns;
  if (matrix.offset < 0 || matrix.offset > slots.arena_size - size || matrix.offset % multiple != 0) {
    if (threadIdx.x == 0) report_fault(slots.fault, fault_word(Fault::kSlotOffsets, slot));
    return {0, 0, 0};
  }
  return matrix;
}

template <class Element, bool kIsTransposed>
__global__ void __launch_bounds__(TileProduct<Element, false, kIsTransposed>::kThreads)
    product_kernel(const GroupedProductArguments arguments) {
  using Product = TileProduct<Element, false, kIsTransposed>;
  HMI_DYNAMIC_SHARED(shared);
  const SlotMatrices& slots = arguments.slots;
  const SegmentTile tile = find_segment_tile(slots.segment_offsets, slots.num_segments, slots.num_tokens, blockIdx.x,
                                             Product::kSize, slots.fault);
  if (tile.segment < 0) return;
  const int64_t slot = slots.segment_slots[tile.segment];
  if (slot == -1) return;
  if (slot < 0 || slot >= slots.num_slots) {
    if (threadIdx.x == 0) report_fault(slots.fault, fault_word(Fault::kSegmentSlots, tile.segment));
    return;
  }
  const int64_t input_size = arguments.inputs.columns, output_size = arguments.output_size;
  const SlotMatrix matrix = kIsTransposed ? load_matrix(slots, slot, output_size, input_size, kSizeMultiple)
                                          : load_matrix(slots, slot, input_size, output_size, kSizeMultiple);
  const int64_t width = kIsTransposed ? matrix.rows : matrix.columns;
  const int64_t depth = kIsTransposed ? matrix.columns : matrix.rows;
  const int64_t first_column = int64_t{blockIdx.y} * Product::kSize;
  if (first_column >= width) return;

  const Element* weights = static_cast<const Element*>(arguments.arena) + matrix.offset;
  const Element* inputs = static_cast<const Element*>(arguments.inputs.start) + tile.row * arguments.inputs.stride;
  const TileSource<Element> left{inputs, arguments.inputs.stride, tile.rows, depth};
  const TileSource<Element> right =
      kIsTransposed
          ? TileSource<Element>{weights + first_column * matrix.columns, matrix.columns, width - first_column, depth}
          : TileSource<Element>{weights + first_column, matrix.columns, depth, width - first_column};
  Product product(shared);
  product.add(left, right, depth);
  Element* outputs = static_cast<Element*>(arguments.outputs) + tile.row * output_size + first_column;
  product.for_each_pair([&](int row, int column, float first, float second) {
    if (row >= tile.rows || first_column + column >= width) return;
    store_pair<Element>(reinterpret_cast<unsigned char*>(outputs + row * output_size + column), first, second);
  });
}

template <class Element>
__global__ void __launch_bounds__(TileProduct<Element, true, false>::kThreads)
    weight_gradient_kernel(const GroupedWeightGradientArguments arguments) {
  using Product = TileProduct<Element, true, false>;
  HMI_DYNAMIC_SHARED(shared);
  const SlotMatrices& slots = arguments.slots;
  const DeviceRows &inputs = arguments.inputs, &gradients = arguments.output_gradients;
  const int64_t slot = blockIdx.x;
  const int64_t first_row = int64_t{blockIdx.y} * Product::kSize, first_column = int64_t{blockIdx.z} * Product::kSize;
  bool is_used = false;
  for (int64_t g = 0; g < slots.num_segments && !is_used; ++g) is_used = slots.segment_slots[g] == slot;
  if (!is_used) return;  // its table may be anything
  const SlotMatrix matrix = load_matrix(slots, slot, inputs.columns, gradients.columns, 1);
  if (first_row >= matrix.rows || first_column >= matrix.columns) return;

  Product product(shared);
  for (int64_t g = 0; g < slots.num_segments; ++g) {
    if (slots.segment_slots[g] != slot) continue;
    const int64_t begin = slots.segment_offsets[g], end = slots.segment_offsets[g + 1];
    if (begin < 0 || end < begin || end > slots.num_tokens) {
      if (threadIdx.x == 0) report_fault(slots.fault, fault_word(Fault::kSegmentOffsets, g));
      continue;
    }
    if (begin == end) continue;
    // Whole units are read, of which columns beyond the matrix are not stored.
    const Element* left = static_cast<const Element*>(inputs.start) + begin * inputs.stride + first_row;
    const Element* right = static_cast<const Element*>(gradients.start) + begin * gradients.stride + first_column;
    product.add({left, inputs.stride, end - begin, inputs.columns - first_row},
                {right, gradients.stride, end - begin, gradients.columns - first_column}, end - begin);
  }
  Element* block = static_cast<Element*>(arguments.gradient) + matrix.offset;
  product.for_each_pair([&](int row, int column, float first, float second) {
    const int64_t r = first_row + row, c = first_column + column;
    if (r >= matrix.rows) return;
    // One by one: where a matrix begins, or is odd, no pair is aligned.
    if (c < matrix.columns) block[r * matrix.columns + c] = from_float<Element>(first);
    if (c + 1 < matrix.columns) block[r * matrix.columns + c + 1] = from_float<Element>(second);
  });
}

template <class Element, bool kIsTransposed>
cudaError_t launch_product(const GroupedProductArguments& arguments, cudaStream_t stream) {
  using Product = TileProduct<Element, false, kIsTransposed>;
  const SlotMatrices& slots = arguments.slots;
  const int64_t tiles = num_segment_tiles(slots.num_tokens, slots.num_segments, Product::kSize);
  const int64_t columns = ceil_div(arguments.output_size, Product::kSize);
  return launch(product_kernel<Element, kIsTransposed>,
                dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(columns)), dim3(Product::kThreads),
                Product::kSharedBytes, stream, arguments);
}

template <class Element>
cudaError_t launch_weight_gradient(const GroupedWeightGradientArguments& arguments, cudaStream_t stream) {
  using Product = TileProduct<Element, true, false>;
  const int64_t rows = ceil_div(arguments.inputs.columns, Product::kSize);
  const int64_t columns = ceil_div(arguments.output_gradients.columns, Product::kSize);
  return launch(weight_gradient_kernel<Element>,
                dim3(static_cast<unsigned>(arguments.slots.num_slots), static_cast<unsigned>(rows),
                     static_cast<unsigned>(columns)),
                dim3(Product::kThreads), Product::kSharedBytes, stream, arguments);
}

}  // namespace

cudaError_t grouped_product(const GroupedProductArguments& arguments, cudaStream_t stream) {
  const SlotMatrices& slots = arguments.slots;
  if (slots.num_tokens == 0 || slots.num_segments == 0 || slots.num_slots == 0) return cudaSuccess;
  switch (arguments.data_type) {
    case DataType::kFloat16:
      return arguments.is_transposed ? launch_product<__half, true>(arguments, stream)
                                     : launch_product<__half, false>(arguments, stream);
    case DataType::kBfloat16:
      return arguments.is_transposed ? launch_product<__nv_bfloat16, true>(arguments, stream)
                                     : launch_product<__nv_bfloat16, false>(arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t grouped_weight_gradient(const GroupedWeightGradientArguments& arguments, cudaStream_t stream) {
  const SlotMatrices& slots = arguments.slots;
  if (slots.num_tokens == 0 || slots.num_segments == 0) return cudaSuccess;
  switch (arguments.data_type) {
    case DataType::kFloat16:
      return launch_weight_gradient<__half>(arguments, stream);
    case DataType::kBfloat16:
      return launch_weight_gradient<__nv_bfloat16>(arguments, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace hmi::cuda
