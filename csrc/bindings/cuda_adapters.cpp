// _C.cuda: grouped adapters and grouped vectors.
#include <algorithm>
#include <stdexcept>

#include "bindings/bindings.h"
#include "cuda/adapter_plan.h"
#include "cuda/error.h"
#include "cuda/grouped_adapter.h"
#include "cuda/grouped_vector.h"

namespace hmi::bindings {
namespace {

DataType data_type(int number) { return static_cast<DataType>(number); }

void grouped_adapter(int type, Address output, int64_t output_stride, const std::vector<int32_t>& output_sizes,
                     Address hidden_states, int64_t hidden_stride, int64_t num_tokens, int32_t input_size,
                     Address arena, int64_t arena_size, Address segment_offsets, Address segment_slots,
                     int64_t num_segments, Address slot_offsets, Address slot_ranks, Address slot_activations,
                     Address slot_scales, int64_t num_slots, int32_t max_rank, Address layer_norm_weight,
                     Address layer_norm_bias, float layer_norm_eps, Address workspace, int32_t max_shared_bytes,
                     Address fault, Address stream) {
  if (output_sizes.empty() || output_sizes.size() > cuda::kMaxProjections) {
    throw std::invalid_argument("output_sizes must name 1 to 4 projections");
  }
  cuda::GroupedAdapterArguments a{};
  a.data_type = data_type(type);
  a.outputs = pointer<void>(output);
  a.output_stride = output_stride;
  a.inputs = pointer<const void>(hidden_states);
  a.input_stride = hidden_stride;
  a.num_tokens = num_tokens;
  a.input_size = input_size;
  a.num_projections = static_cast<int32_t>(output_sizes.size());
  std::copy(output_sizes.begin(), output_sizes.end(), a.output_sizes);
  a.arena = pointer<const void>(arena);
  a.arena_size = arena_size;
  a.segment_offsets = pointer<const int64_t>(segment_offsets);
  a.segment_slots = pointer<const int32_t>(segment_slots);
  a.num_segments = num_segments;
  a.slot_offsets = pointer<const int64_t>(slot_offsets);
  a.slot_ranks = pointer<const int32_t>(slot_ranks);
  a.slot_activations = pointer<const int32_t>(slot_activations);
  a.slot_scales = pointer<const float>(slot_scales);
  a.num_slots = num_slots;
  a.max_rank = max_rank;
  a.layer_norm_weight = pointer<const void>(layer_norm_weight);
  a.layer_norm_bias = pointer<const void>(layer_norm_bias);
  a.layer_norm_epsilon = layer_norm_eps;
  a.workspace = pointer<float>(workspace);
  a.max_shared_bytes = max_shared_bytes;
  a.fault = pointer<unsigned long long>(fault);
  cuda::require("launch of grouped_adapter", cuda::grouped_adapter(a, pointer<CUstream_st>(stream)));
}

void grouped_vector(bool is_scale, int type, Address hidden_states, int64_t stride, int64_t num_tokens,
                    int32_t hidden_size, Address arena, int64_t arena_size, Address segment_offsets,
                    Address segment_slots, int64_t num_segments, Address slot_offsets, int64_t num_slots,
                    Address fault, Address stream) {
  const cuda::GroupedVectorArguments a{is_scale ? cuda::VectorOperation::kScale : cuda::VectorOperation::kAdd,
                                       data_type(type),
                                       pointer<void>(hidden_states),
                                       stride,
                                       num_tokens,
                                       hidden_size,
                                       pointer<const void>(arena),
                                       arena_size,
                                       pointer<const int64_t>(segment_offsets),
                                       pointer<const int32_t>(segment_slots),
                                       num_segments,
                                       pointer<const int64_t>(slot_offsets),
                                       num_slots,
                                       pointer<unsigned long long>(fault)};
  cuda::require("launch of grouped_vector", cuda::grouped_vector(a, pointer<CUstream_st>(stream)));
}

cuda::AdapterPlan plan_adapter(int64_t num_tokens, int64_t num_segments, int32_t input_size, int32_t total_output_size,
                               int32_t num_projections, int32_t max_rank, bool has_layer_norm,
                               int32_t max_shared_bytes) {
  return cuda::plan_adapter({num_tokens, num_segments, input_size, total_output_size, num_projections, max_rank,
                             has_layer_norm, max_shared_bytes});
}

const char* name_of_kernel(const cuda::AdapterPlan& plan) {
  switch (plan.kernel) {
    case cuda::AdapterKernel::kTiles:
      return "tiles";
    case cuda::AdapterKernel::kSlices:
      return "slices";
    default:
      return "gemv";
  }
}

}  // namespace

void define_cuda_adapters(py::module_& m) {
  using cuda::AdapterPlan;
  py::class_<AdapterPlan>(m, "AdapterPlan")
      .def_property_readonly("kernel", &name_of_kernel)
      .def_readonly("tile_rows", &AdapterPlan::tile_rows)
      .def_readonly("num_stages", &AdapterPlan::num_stages)
      .def_readonly("rank_class", &AdapterPlan::rank_class)
      .def_readonly("chunk", &AdapterPlan::chunk)
      .def_readonly("blocks_per_multiprocessor", &AdapterPlan::blocks_per_multiprocessor)
      .def_readonly("shared_bytes", &AdapterPlan::shared_bytes)
      .def_readonly("launches", &AdapterPlan::launches)
      .def_readonly("group_tokens", &AdapterPlan::group_tokens)
      .def_readonly("splits", &AdapterPlan::splits)
      .def_readonly("column_chunks", &AdapterPlan::column_chunks)
      .def_readonly("workspace_elements", &AdapterPlan::workspace_elements);
  m.def("plan_adapter", &plan_adapter, py::arg("num_tokens"), py::arg("num_segments"), py::arg("input_size"),
        py::arg("total_output_size"), py::arg("num_projections"), py::arg("max_rank"), py::arg("has_layer_norm"),
        py::arg("max_shared_bytes"));
  m.def("grouped_adapter", &grouped_adapter, py::arg("data_type"), py::arg("output"), py::arg("output_stride"),
        py::arg("output_sizes"), py::arg("hidden_states"), py::arg("hidden_stride"), py::arg("num_tokens"),
        py::arg("input_size"), py::arg("arena"), py::arg("arena_size"), py::arg("segment_offsets"),
        py::arg("segment_slots"), py::arg("num_segments"), py::arg("slot_offsets"), py::arg("slot_ranks"),
        py::arg("slot_activations"), py::arg("slot_scales"), py::arg("num_slots"), py::arg("max_rank"),
        py::arg("layer_norm_weight"), py::arg("layer_norm_bias"), py::arg("layer_norm_eps"), py::arg("workspace"),
        py::arg("max_shared_bytes"), py::arg("fault"), py::arg("stream"), WithoutLock());
  m.def("grouped_vector", &grouped_vector, py::arg("is_scale"), py::arg("data_type"), py::arg("hidden_states"),
        py::arg("stride"), py::arg("num_tokens"), py::arg("hidden_size"), py::arg("arena"), py::arg("arena_size"),
        py::arg("segment_offsets"), py::arg("segment_slots"), py::arg("num_segments"), py::arg("slot_offsets"),
        py::arg("num_slots"), py::arg("fault"), py::arg("stream"), WithoutLock());
}

}  // namespace hmi::bindings
