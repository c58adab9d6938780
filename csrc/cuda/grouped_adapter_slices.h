// Adapters of few ranks on tensor cores, each warp for itself: see grouped_adapter_slices.cuh.
#pragma once

#include "cuda/adapter_plan.h"
#include "cuda/grouped_adapter.h"

namespace hmi::cuda {

// cudaErrorInvalidValue for a plan whose shape is not compiled.
cudaError_t launch_adapter_slices(const GroupedAdapterArguments& arguments, const AdapterPlan& plan,
                                  cudaStream_t stream);

}  // namespace hmi::cuda
