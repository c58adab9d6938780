#include "cuda/grouped_adapter_tiles.h"

#include "cuda/grouped_adapter_tiles.cuh"

namespace hmi::cuda {
namespace {

template <class Element, class TileType>
cudaError_t launch_tile(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  const int64_t blocks = num_segment_tiles(arguments.num_tokens, arguments.num_segments, TileType::kRows);
  return launch(adapter_tiles_kernel<Element, TileType>, dim3(static_cast<unsigned>(blocks)),
                dim3(TileType::kThreads), static_cast<size_t>(plan.shared_bytes), stream, arguments, plan.num_stages);
}

template <class Element>
cudaError_t launch_shape(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  const TileShape wanted{plan.tile_rows, plan.rank_class, plan.chunk};
#define HMI_LAUNCH(rows, rank_class, chunk)                                      \
  if (wanted == TileShape{rows, rank_class, chunk}) {                            \
    return launch_tile<Element, Tile<rows, rank_class, chunk>>(arguments, plan, stream); \
  }
  HMI_ADAPTER_TILES(HMI_LAUNCH)
#undef HMI_LAUNCH
  return cudaErrorInvalidValue;
}

cudaError_t launch_type(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  switch (arguments.data_type) {
    case DataType::kFloat16:
      return launch_shape<__half>(arguments, plan, stream);
    case DataType::kBfloat16:
      return launch_shape<__nv_bfloat16>(arguments, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// The arguments of one projection alone. It is LoRA's: of a bottleneck there is only one.
GroupedAdapterArguments only_projection(const GroupedAdapterArguments& arguments, int projection) {
  GroupedAdapterArguments one = arguments;
  one.num_projections = 1;
  one.output_sizes[0] = arguments.output_sizes[projection];
  int64_t column = 0;
  for (int p = 0; p < projection; ++p) column += arguments.output_sizes[p];
  one.outputs = static_cast<char*>(arguments.outputs) + column * 2;
  one.slot_offsets += projection * arguments.num_slots;
  one.slot_ranks += projection * arguments.num_slots;
  one.slot_scales += projection * arguments.num_slots;
  return one;
}

}  // namespace

cudaError_t launch_adapter_tiles(const GroupedAdapterArguments& arguments, const AdapterPlan& plan,
                                 cudaStream_t stream) {
  const int projections_at_once = plan.launches == 1 ? arguments.num_projections : 1;
  if (inner_columns(arguments.max_rank, projections_at_once) > plan.rank_class) return cudaErrorInvalidValue;
  if (plan.launches == 1) return launch_type(arguments, plan, stream);
  for (int projection = 0; projection < plan.launches; ++projection) {
    const cudaError_t error = launch_type(only_projection(arguments, projection), plan, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace hmi::cuda
