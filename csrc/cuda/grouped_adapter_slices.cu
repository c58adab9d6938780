#include "cuda/grouped_adapter_slices.h"

#include "cuda/grouped_adapter_slices.cuh"

namespace hmi::cuda {
namespace {

template <class Element, class SliceType>
cudaError_t launch_slices(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
  const int64_t blocks = num_segment_tiles(arguments.num_tokens, arguments.num_segments, SliceType::kRows);
  return launch(adapter_slices_kernel<Element, SliceType>, dim3(static_cast<unsigned>(blocks)),
                dim3(SliceType::kThreads), static_cast<size_t>(plan.shared_bytes), stream, arguments);
}

template <class Element>
cudaError_t launch_shape(const GroupedAdapterArguments& arguments, const AdapterPlan& plan, cudaStream_t stream) {
#define HMI_LAUNCH(ranks, stages)                                             \
  if (plan.rank_class == ranks && plan.num_stages == stages) {                \
    return launch_slices<Element, Slice<ranks, stages>>(arguments, plan, stream); \
  }
  HMI_ADAPTER_SLICES(HMI_LAUNCH)
#undef HMI_LAUNCH
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_adapter_slices(const GroupedAdapterArguments& arguments, const AdapterPlan& plan,
                                  cudaStream_t stream) {
  if (inner_columns(arguments.max_rank, arguments.num_projections) > plan.rank_class) return cudaErrorInvalidValue;
  switch (arguments.data_type) {
    case DataType::kFloat16:
      return launch_shape<__half>(arguments, plan, stream);
    case DataType::kBfloat16:
      return launch_shape<__nv_bfloat16>(arguments, plan, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace hmi::cuda
