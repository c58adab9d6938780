// The entry to the grouped adapters: the plan of the call's shape, then the kernel that it names.
#include "cuda/grouped_adapter.h"

#include "cuda/adapter_plan.h"
#include "cuda/grouped_adapter_gemv.h"
#include "cuda/grouped_adapter_slices.h"
#include "cuda/grouped_adapter_tiles.h"

namespace hmi::cuda {
namespace {

AdapterShape shape_of(const GroupedAdapterArguments& arguments) {
  int32_t total_output_size = 0;
  for (int p = 0; p < arguments.num_projections; ++p) total_output_size += arguments.output_sizes[p];
  return {arguments.num_tokens,       arguments.num_segments, arguments.input_size,
          total_output_size,          arguments.num_projections, arguments.max_rank,
          arguments.layer_norm_weight != nullptr, arguments.max_shared_bytes};
}

}  // namespace

cudaError_t grouped_adapter(const GroupedAdapterArguments& arguments, cudaStream_t stream) {
  if (arguments.num_tokens == 0 || arguments.num_segments == 0) return cudaSuccess;
  const AdapterPlan plan = plan_adapter(shape_of(arguments));
  switch (plan.kernel) {
    case AdapterKernel::kSlices:
      return launch_adapter_slices(arguments, plan, stream);
    case AdapterKernel::kTiles:
      return launch_adapter_tiles(arguments, plan, stream);
    default:
      return launch_adapter_gemv(arguments, plan, stream);
  }
}

}  // namespace hmi::cuda
