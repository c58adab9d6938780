// Adapters on tensor cores, one block for up to 64 tokens of a segment: see grouped_adapter_tiles.cuh.
#pragma once

#include "cuda/adapter_plan.h"
#include "cuda/grouped_adapter.h"

namespace hmi::cuda {

// cudaErrorInvalidValue for a plan whose shape is not compiled.
cudaError_t launch_adapter_tiles(const GroupedAdapterArguments& arguments, const AdapterPlan& plan,
                                 cudaStream_t stream);

}  // namespace hmi::cuda
