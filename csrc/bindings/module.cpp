// The module _C: the settings and the CPU kernels, which check every value themselves.
#include "bindings/row_tables.h"
#include "common/freed_memory.h"
#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/grouped_adapter.h"
#include "cpu/grouped_product.h"
#include "cpu/grouped_vector.h"
#include "cpu/ngram_counter.h"
#include "cpu/packed_attention.h"
#include "cpu/plot_index.h"
#include "cpu/plot_lookup.h"
#include "cpu/plot_merge.h"
#include "cpu/simd/dispatch.h"

namespace hmi::bindings {
namespace {

hmi::PackedSequences packed(Address input_ids, int64_t num_tokens, Address offsets, int64_t num_sequences) {
  return {pointer<const int32_t>(input_ids), pointer<const int64_t>(offsets), num_sequences, num_tokens};
}

void plot_index_build(Address index, int64_t capacity, Address keys, int64_t count) {
  plot_index(index, capacity).build(pointer<const int64_t>(keys), count);
}

void plot_index_insert(Address index, int64_t capacity, Address keys, Address rows, int64_t count) {
  plot_index(index, capacity).insert(pointer<const int64_t>(keys), pointer<const int64_t>(rows), count);
}

void plot_index_find(Address index, int64_t capacity, Address keys, Address rows, int64_t count, int num_threads) {
  hmi::plot_index_find(plot_index(index, capacity), pointer<const int64_t>(keys), pointer<int64_t>(rows), count,
                       num_threads);
}

void plot_lookup(Address input_ids, int64_t num_tokens, Address sequence_offsets, int64_t num_sequences,
                 const std::vector<NumberedIndex>& indexes, Address chains, int64_t chain_width, int window,
                 Address references, int num_threads) {
  const std::vector<hmi::PlotIndex> converted = plot_indexes(indexes);
  hmi::plot_lookup({packed(input_ids, num_tokens, sequence_offsets, num_sequences), converted,
                    pointer<const int32_t>(chains), chain_width, window, pointer<int64_t>(references)},
                   num_threads);
}

void plot_merge(Address input_ids, int64_t num_tokens, Address sequence_offsets, int64_t num_sequences,
                Address references, const std::vector<NumberedTable>& rows,
                const std::vector<NumberedTable>& unigrams, Address sequence_unigram_tables,
                Address position_embeddings, int64_t num_positions, Address layer_norm_weight,
                Address layer_norm_bias, float layer_norm_eps, int window, int64_t hidden_size, Address output,
                int num_threads) {
  hmi::plot_merge({packed(input_ids, num_tokens, sequence_offsets, num_sequences), pointer<const int64_t>(references),
                   row_tables(rows), row_tables(unigrams), pointer<const int32_t>(sequence_unigram_tables),
                   pointer<const float>(position_embeddings), num_positions, pointer<const float>(layer_norm_weight),
                   pointer<const float>(layer_norm_bias), layer_norm_eps, window, hidden_size, pointer<float>(output)},
                  num_threads);
}

// Projection p writes the p-th group of `output_sizes` columns; slot tables are [projections, slots].
void grouped_adapter(Address output, int64_t output_stride, const std::vector<int64_t>& output_sizes,
                     Address hidden_states, int64_t hidden_stride, int64_t hidden_size, int64_t num_tokens,
                     Address arena, int64_t arena_size, Address segment_offsets, Address segment_slots,
                     int64_t num_segments, Address slot_offsets, Address slot_ranks, Address slot_activations,
                     Address slot_scales, int64_t num_slots, int num_threads) {
  std::vector<hmi::GroupedAdapterArguments> projections;
  float* columns = pointer<float>(output);
  int64_t first = 0;
  for (const int64_t output_size : output_sizes) {
    projections.push_back({columns, output_stride, pointer<const float>(hidden_states), hidden_stride, num_tokens,
                           hidden_size, output_size, pointer<const float>(arena), arena_size,
                           pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots), num_segments,
                           pointer<const int64_t>(slot_offsets) + first, pointer<const int32_t>(slot_ranks) + first,
                           slot_activations ? pointer<const int32_t>(slot_activations) + first : nullptr,
                           pointer<const float>(slot_scales) + first, num_slots});
    columns += output_size;
    first += num_slots;
  }
  hmi::grouped_adapter(projections, num_threads);
}

void grouped_vector(bool is_scale, Address rows, int64_t stride, int64_t num_tokens, int64_t hidden_size, Address arena,
                    int64_t arena_size, Address segment_offsets, Address segment_slots, int64_t num_segments,
                    Address slot_offsets, int64_t num_slots, int num_threads) {
  const auto operation = is_scale ? hmi::VectorOperation::kScale : hmi::VectorOperation::kAdd;
  hmi::grouped_vector({operation, pointer<float>(rows), stride, num_tokens, hidden_size, pointer<const float>(arena),
                       arena_size, pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots),
                       num_segments, pointer<const int64_t>(slot_offsets), num_slots},
                      num_threads);
}

void grouped_product(Address outputs, int64_t output_size, Address inputs, int64_t input_stride, int64_t input_size,
                     int64_t num_tokens, Address arena, int64_t arena_size, Address segment_offsets,
                     Address segment_slots, int64_t num_segments, Address slot_offsets, Address slot_rows,
                     Address slot_columns, int64_t num_slots, bool is_transposed, int num_threads) {
  const int64_t max_rows = is_transposed ? output_size : input_size;
  const int64_t max_columns = is_transposed ? input_size : output_size;
  hmi::grouped_product(pointer<float>(outputs), output_size, {pointer<const float>(inputs), input_stride, input_size},
                       pointer<const float>(arena),
                       {pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots), num_segments,
                        num_tokens, num_slots},
                       {pointer<const int64_t>(slot_offsets), pointer<const int32_t>(slot_rows),
                        pointer<const int32_t>(slot_columns), arena_size, max_rows, max_columns, 1},
                       is_transposed, num_threads);
}

void grouped_weight_gradient(Address gradient, int64_t arena_size, Address inputs, int64_t input_stride,
                             int64_t input_size, Address output_gradients, int64_t output_stride, int64_t output_size,
                             int64_t num_tokens, Address segment_offsets, Address segment_slots, int64_t num_segments,
                             Address slot_offsets, Address slot_rows, Address slot_columns, int64_t num_slots,
                             int num_threads) {
  hmi::grouped_weight_gradient(
      pointer<float>(gradient), {pointer<const float>(inputs), input_stride, input_size},
      {pointer<const float>(output_gradients), output_stride, output_size},
      {pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots), num_segments, num_tokens,
       num_slots},
      {pointer<const int64_t>(slot_offsets), pointer<const int32_t>(slot_rows), pointer<const int32_t>(slot_columns),
       arena_size, input_size, output_size, 1},
      num_threads);
}

// slot_offsets 0: the slot tables lie on a device and are not looked at.
void check_segments(Address segment_offsets, Address segment_slots, int64_t num_segments, int64_t num_tokens,
                    int64_t num_slots, Address slot_offsets, Address slot_ranks, Address slot_activations,
                    int64_t arena_size, int64_t per_rank, int64_t fixed, int64_t multiple, int64_t max_rank) {
  const hmi::Segments segments{pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots),
                               num_segments, num_tokens, num_slots};
  hmi::check_segments(segments);
  if (slot_offsets == 0) return;
  hmi::check_slots(segments, {pointer<const int64_t>(slot_offsets), pointer<const int32_t>(slot_ranks),
                              pointer<const int32_t>(slot_activations), arena_size, per_rank, fixed, multiple,
                              max_rank});
}

// Likewise for slots whose block is one matrix.
void check_matrices(Address segment_offsets, Address segment_slots, int64_t num_segments, int64_t num_tokens,
                    int64_t num_slots, Address slot_offsets, Address slot_rows, Address slot_columns,
                    int64_t arena_size, int64_t max_rows, int64_t max_columns, int64_t multiple,
                    bool must_be_disjoint) {
  const hmi::Segments segments{pointer<const int64_t>(segment_offsets), pointer<const int32_t>(segment_slots),
                               num_segments, num_tokens, num_slots};
  hmi::check_segments(segments);
  if (slot_offsets == 0) return;
  hmi::check_matrices(segments,
                      {pointer<const int64_t>(slot_offsets), pointer<const int32_t>(slot_rows),
                       pointer<const int32_t>(slot_columns), arena_size, max_rows, max_columns, multiple},
                      must_be_disjoint);
}

void packed_attention(Address queries, int64_t query_stride, Address keys, int64_t key_stride, Address values,
                      int64_t value_stride, Address output, int64_t output_stride, Address query_offsets,
                      Address key_offsets, int64_t num_sequences, int64_t num_queries, int64_t num_keys,
                      int64_t num_heads, int64_t head_size, int num_threads) {
  hmi::packed_attention({pointer<const float>(queries), query_stride, pointer<const float>(keys), key_stride,
                         pointer<const float>(values), value_stride, pointer<float>(output), output_stride,
                         pointer<const int64_t>(query_offsets), pointer<const int64_t>(key_offsets), num_sequences,
                         num_queries, num_keys, num_heads, head_size},
                        num_threads);
}

// Items travel as the bytes of (key, count) pairs, which any array library can view without a copy per element.
py::bytearray as_bytes(const std::vector<hmi::KeyCount>& items) {
  return py::bytearray(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(hmi::KeyCount));
}

py::bytearray counter_items(const hmi::NgramCounter& counter, int64_t min_count, int num_threads) {
  std::vector<hmi::KeyCount> items;
  {
    py::gil_scoped_release release;
    items = counter.items(min_count, num_threads);
  }
  return as_bytes(items);
}

py::bytearray counter_take_shard(hmi::NgramCounter& counter, int shard) {
  std::vector<hmi::KeyCount> items;
  {
    py::gil_scoped_release release;
    items = counter.take_shard(shard);
  }
  return as_bytes(items);
}

void counter_add(hmi::NgramCounter& counter, Address input_ids, int64_t num_tokens, Address sequence_offsets,
                 int64_t num_sequences, int num_threads) {
  counter.add(packed(input_ids, num_tokens, sequence_offsets, num_sequences), num_threads);
}

void set_threads_mode(const std::string& mode) {
  if (mode == "auto") return hmi::set_threads_mode(hmi::ThreadsMode::kAuto);
  if (mode == "pool") return hmi::set_threads_mode(hmi::ThreadsMode::kPool);
  if (mode == "openmp") return hmi::set_threads_mode(hmi::ThreadsMode::kOpenMp);
  throw std::invalid_argument("threads mode must be auto, pool or openmp, not " + mode);
}

std::string threads_mode() {
  return hmi::active_threads_mode() == hmi::ThreadsMode::kOpenMp ? "openmp" : "pool";
}

void define_settings(py::module_& m) {
  m.attr("with_cuda") = py::bool_(HMI_WITH_CUDA);
  m.attr("cuda_architectures") = HMI_CUDA_ARCHITECTURES;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.def("set_simd_level", &hmi::set_simd_level, py::arg("level"));
  m.def("simd_level", [] { return std::string(hmi::active_kernels().name); });
  m.def("compiled_simd_levels", &hmi::compiled_simd_levels);
  m.def("available_simd_levels", &hmi::available_simd_levels);
  m.def("set_threads_mode", &set_threads_mode, py::arg("mode"));
  m.def("threads_mode", &threads_mode);
  m.def("release_team", &hmi::release_team, WithoutLock());
  m.def("keep_freed_memory", &hmi::keep_freed_memory);
}

void define_plot(py::module_& m) {
  m.def("plot_index_capacity", &hmi::PlotIndex::capacity_for, py::arg("count"));
  m.def("plot_index_build", &plot_index_build, py::arg("index"), py::arg("capacity"), py::arg("keys"),
        py::arg("count"), WithoutLock());
  m.def("plot_index_insert", &plot_index_insert, py::arg("index"), py::arg("capacity"), py::arg("keys"),
        py::arg("rows"), py::arg("count"), WithoutLock());
  m.def("plot_index_find", &plot_index_find, py::arg("index"), py::arg("capacity"), py::arg("keys"), py::arg("rows"),
        py::arg("count"), py::arg("num_threads"), WithoutLock());
  m.def("plot_lookup", &plot_lookup, py::arg("input_ids"), py::arg("num_tokens"), py::arg("sequence_offsets"),
        py::arg("num_sequences"), py::arg("indexes"), py::arg("chains"), py::arg("chain_width"), py::arg("window"),
        py::arg("references"), py::arg("num_threads"), WithoutLock());
  m.def("plot_merge", &plot_merge, py::arg("input_ids"), py::arg("num_tokens"), py::arg("sequence_offsets"),
        py::arg("num_sequences"), py::arg("references"), py::arg("row_tables"), py::arg("unigram_tables"),
        py::arg("sequence_unigram_tables"), py::arg("position_embeddings"), py::arg("num_positions"),
        py::arg("layer_norm_weight"), py::arg("layer_norm_bias"), py::arg("layer_norm_eps"), py::arg("window"),
        py::arg("hidden_size"), py::arg("output"), py::arg("num_threads"), WithoutLock());
}

void define_adapters(py::module_& m) {
  m.def("grouped_adapter", &grouped_adapter, py::arg("output"), py::arg("output_stride"), py::arg("output_sizes"),
        py::arg("hidden_states"), py::arg("hidden_stride"), py::arg("hidden_size"), py::arg("num_tokens"),
        py::arg("arena"), py::arg("arena_size"), py::arg("segment_offsets"), py::arg("segment_slots"),
        py::arg("num_segments"), py::arg("slot_offsets"), py::arg("slot_ranks"), py::arg("slot_activations"),
        py::arg("slot_scales"), py::arg("num_slots"), py::arg("num_threads"), WithoutLock());
}

void define_products(py::module_& m) {
  m.def("grouped_product", &grouped_product, py::arg("outputs"), py::arg("output_size"), py::arg("inputs"),
        py::arg("input_stride"), py::arg("input_size"), py::arg("num_tokens"), py::arg("arena"), py::arg("arena_size"),
        py::arg("segment_offsets"), py::arg("segment_slots"), py::arg("num_segments"), py::arg("slot_offsets"),
        py::arg("slot_rows"), py::arg("slot_columns"), py::arg("num_slots"), py::arg("is_transposed"),
        py::arg("num_threads"), WithoutLock());
  m.def("grouped_weight_gradient", &grouped_weight_gradient, py::arg("gradient"), py::arg("arena_size"),
        py::arg("inputs"), py::arg("input_stride"), py::arg("input_size"), py::arg("output_gradients"),
        py::arg("output_stride"), py::arg("output_size"), py::arg("num_tokens"), py::arg("segment_offsets"),
        py::arg("segment_slots"), py::arg("num_segments"), py::arg("slot_offsets"), py::arg("slot_rows"),
        py::arg("slot_columns"), py::arg("num_slots"), py::arg("num_threads"), WithoutLock());
}

void define_vectors(py::module_& m) {
  m.def("grouped_vector", &grouped_vector, py::arg("is_scale"), py::arg("rows"), py::arg("stride"),
        py::arg("num_tokens"), py::arg("hidden_size"), py::arg("arena"), py::arg("arena_size"),
        py::arg("segment_offsets"), py::arg("segment_slots"), py::arg("num_segments"), py::arg("slot_offsets"),
        py::arg("num_slots"), py::arg("num_threads"), WithoutLock());
}

void define_checks(py::module_& m) {
  m.def("check_segments", &check_segments, py::arg("segment_offsets"), py::arg("segment_slots"),
        py::arg("num_segments"), py::arg("num_tokens"), py::arg("num_slots"), py::arg("slot_offsets"),
        py::arg("slot_ranks"), py::arg("slot_activations"), py::arg("arena_size"), py::arg("per_rank"),
        py::arg("fixed"), py::arg("multiple"), py::arg("max_rank"), WithoutLock());
  m.def("check_matrices", &check_matrices, py::arg("segment_offsets"), py::arg("segment_slots"),
        py::arg("num_segments"), py::arg("num_tokens"), py::arg("num_slots"), py::arg("slot_offsets"),
        py::arg("slot_rows"), py::arg("slot_columns"), py::arg("arena_size"), py::arg("max_rows"),
        py::arg("max_columns"), py::arg("multiple"), py::arg("must_be_disjoint"), WithoutLock());
}

void define_attention(py::module_& m) {
  m.def("packed_attention", &packed_attention, py::arg("query"), py::arg("query_stride"), py::arg("key"),
        py::arg("key_stride"), py::arg("value"), py::arg("value_stride"), py::arg("output"), py::arg("output_stride"),
        py::arg("query_offsets"), py::arg("key_offsets"), py::arg("num_sequences"), py::arg("num_queries"),
        py::arg("num_keys"), py::arg("num_heads"), py::arg("head_size"), py::arg("num_threads"), WithoutLock());
}

void define_counter(py::module_& m) {
  py::class_<hmi::NgramCounter>(m, "NgramCounter")
      .def(py::init<int>(), py::arg("order"))
      .def("add", &counter_add, py::arg("input_ids"), py::arg("num_tokens"), py::arg("sequence_offsets"),
           py::arg("num_sequences"), py::arg("num_threads"), WithoutLock())
      .def("items", &counter_items, py::arg("min_count"), py::arg("num_threads"))
      .def("take_shard", &counter_take_shard, py::arg("shard"))
      .def_property_readonly("num_shards", &hmi::NgramCounter::num_shards)
      .def("__len__", &hmi::NgramCounter::size)
      .def_property_readonly("total", &hmi::NgramCounter::total)
      .def_property_readonly("memory_bytes", &hmi::NgramCounter::memory_bytes);
}

}  // namespace
}  // namespace hmi::bindings

PYBIND11_MODULE(_C, m) {
  using namespace hmi::bindings;
  m.doc() = "Kernels of hmi_kernels over raw addresses. Use the functions of hmi_kernels instead.";
  define_settings(m);
  define_plot(m);
  define_adapters(m);
  define_products(m);
  define_vectors(m);
  define_checks(m);
  define_attention(m);
  define_counter(m);
  define_pool(m);
  define_sketch(m);
  define_decoding(m);
  define_files(m);
#if HMI_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  define_cuda(cuda);
#endif
}
