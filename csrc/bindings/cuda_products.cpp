// _C.cuda: grouped products and the gradients of their matrices.
#include "bindings/bindings.h"
#include "cuda/error.h"
#include "cuda/grouped_product.h"

namespace hmi::bindings {
namespace {

void grouped_product(int type, Address outputs, int32_t output_size, Address inputs, int64_t input_stride,
                     int32_t input_size, int64_t num_tokens, Address arena, int64_t arena_size,
                     Address segment_offsets, Address segment_slots, int64_t num_segments, Address slot_offsets,
                     Address slot_rows, Address slot_columns, int64_t num_slots, bool is_transposed, Address fault,
                     Address stream) {
  const cuda::GroupedProductArguments a{
      static_cast<DataType>(type),
      pointer<void>(outputs),
      output_size,
      {pointer<const void>(inputs), input_stride, input_size},
      pointer<const void>(arena),
      {pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots), num_segments, num_tokens,
       pointer<const int64_t>(slot_offsets), pointer<const int32_t>(slot_rows), pointer<const int32_t>(slot_columns),
       num_slots, arena_size, pointer<unsigned long long>(fault)},
      is_transposed};
  cuda::require("launch of grouped_product", cuda::grouped_product(a, pointer<CUstream_st>(stream)));
}

void grouped_weight_gradient(int type, Address gradient, int64_t arena_size, Address inputs, int64_t input_stride,
                             int32_t input_size, Address output_gradients, int64_t output_stride, int32_t output_size,
                             int64_t num_tokens, Address segment_offsets, Address segment_slots, int64_t num_segments,
                             Address slot_offsets, Address slot_rows, Address slot_columns, int64_t num_slots,
                             Address fault, Address stream) {
  const cuda::GroupedWeightGradientArguments a{
      static_cast<DataType>(type),
      pointer<void>(gradient),
      {pointer<const void>(inputs), input_stride, input_size},
      {pointer<const void>(output_gradients), output_stride, output_size},
      {pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots), num_segments, num_tokens,
       pointer<const int64_t>(slot_offsets), pointer<const int32_t>(slot_rows), pointer<const int32_t>(slot_columns),
       num_slots, arena_size, pointer<unsigned long long>(fault)}};
  cuda::require("launch of grouped_weight_gradient", cuda::grouped_weight_gradient(a, pointer<CUstream_st>(stream)));
}

}  // namespace

void define_cuda_products(py::module_& m) {
  m.def("grouped_product", &grouped_product, py::arg("data_type"), py::arg("outputs"), py::arg("output_size"),
        py::arg("inputs"), py::arg("input_stride"), py::arg("input_size"), py::arg("num_tokens"), py::arg("arena"),
        py::arg("arena_size"), py::arg("segment_offsets"), py::arg("segment_slots"), py::arg("num_segments"),
        py::arg("slot_offsets"), py::arg("slot_rows"), py::arg("slot_columns"), py::arg("num_slots"),
        py::arg("is_transposed"), py::arg("fault"), py::arg("stream"), WithoutLock());
  m.def("grouped_weight_gradient", &grouped_weight_gradient, py::arg("data_type"), py::arg("gradient"),
        py::arg("arena_size"), py::arg("inputs"), py::arg("input_stride"), py::arg("input_size"),
        py::arg("output_gradients"), py::arg("output_stride"), py::arg("output_size"), py::arg("num_tokens"),
        py::arg("segment_offsets"), py::arg("segment_slots"), py::arg("num_segments"), py::arg("slot_offsets"),
        py::arg("slot_rows"), py::arg("slot_columns"), py::arg("num_slots"), py::arg("fault"), py::arg("stream"),
        WithoutLock());
}

}  // namespace hmi::bindings
