// _C.cuda: PLOT.
#include <cuda_runtime_api.h>

#include <stdexcept>

#include "bindings/bindings.h"
#include "cuda/error.h"
#include "cuda/plot_lookup.h"
#include "cuda/plot_merge.h"

namespace hmi::bindings {
namespace {

// (address, rows, number of its DataType, address of its scales or codebooks or 0, elements of a piece)
using NumberedTable = std::tuple<Address, int64_t, int, Address, int32_t>;

// Throws std::invalid_argument if there are more than the kernel's parameters have room for.
void require_room(const char* name, size_t count, size_t room) {
  if (count <= room) return;
  throw std::invalid_argument(std::string(name) + " must be at most " + std::to_string(room) + ", not " +
                              std::to_string(count));
}

void plot_lookup(Address input_ids, int64_t num_tokens, Address sequence_offsets, int64_t num_sequences,
                 const std::vector<std::pair<Address, int64_t>>& indexes, Address chains, int32_t chain_width,
                 int window, Address references, Address fault, Address stream) {
  require_room("indexes", indexes.size(), cuda::kMaxIndexes);
  cuda::PlotLookupArguments a{};
  a.input_ids = pointer<const int32_t>(input_ids);
  a.num_tokens = num_tokens;
  a.sequence_offsets = pointer<const int64_t>(sequence_offsets);
  a.num_sequences = num_sequences;
  for (const auto& [slots, capacity] : indexes) {
    int64_t bits = 0;
    while (int64_t{1} << bits < capacity) ++bits;
    a.indexes[a.num_indexes++] = {pointer<const IndexSlot>(slots), bits};
  }
  a.chains = pointer<const int32_t>(chains);
  a.chain_width = chain_width;
  a.window = window;
  a.references = pointer<int64_t>(references);
  a.fault = pointer<unsigned long long>(fault);
  cuda::require("launch of plot_lookup", cuda::plot_lookup(a, pointer<CUstream_st>(stream)));
}

int32_t copy_tables(const char* name, const std::vector<NumberedTable>& from, cuda::DeviceTable* to) {
  require_room(name, from.size(), cuda::kMaxTables);
  for (const auto& [address, num_rows, type, decoding, piece_size] : from) {
    *to++ = {pointer<const void>(address), pointer<const void>(decoding), num_rows, static_cast<DataType>(type),
             piece_size};
  }
  return static_cast<int32_t>(from.size());
}

void plot_merge(Address input_ids, int64_t num_tokens, Address sequence_offsets, int64_t num_sequences,
                Address references, const std::vector<NumberedTable>& row_tables,
                const std::vector<NumberedTable>& unigram_tables, Address sequence_unigram_tables, int data_type,
                Address position_embeddings, int64_t num_positions, Address layer_norm_weight, Address layer_norm_bias,
                float layer_norm_eps, int window, int32_t hidden_size, Address output, Address fault, Address stream) {
  cuda::PlotMergeArguments a{};
  a.input_ids = pointer<const int32_t>(input_ids);
  a.num_tokens = num_tokens;
  a.sequence_offsets = pointer<const int64_t>(sequence_offsets);
  a.num_sequences = num_sequences;
  a.references = pointer<const int64_t>(references);
  a.num_row_tables = copy_tables("row_tables", row_tables, a.row_tables);
  a.num_unigram_tables = copy_tables("unigram_tables", unigram_tables, a.unigram_tables);
  a.sequence_unigram_tables = pointer<const int32_t>(sequence_unigram_tables);
  a.data_type = static_cast<DataType>(data_type);
  a.position_embeddings = pointer<const void>(position_embeddings);
  a.num_positions = num_positions;
  a.layer_norm_weight = pointer<const void>(layer_norm_weight);
  a.layer_norm_bias = pointer<const void>(layer_norm_bias);
  a.layer_norm_epsilon = layer_norm_eps;
  a.window = window;
  a.hidden_size = hidden_size;
  a.output = pointer<void>(output);
  a.fault = pointer<unsigned long long>(fault);
  cuda::require("launch of plot_merge", cuda::plot_merge(a, pointer<CUstream_st>(stream)));
}

// Where the device sees page-locked host memory.
Address device_pointer(Address host) {
  void* device = nullptr;
  cuda::require("cudaHostGetDevicePointer", cudaHostGetDevicePointer(&device, pointer<void>(host), 0));
  return reinterpret_cast<Address>(device);
}

}  // namespace

void define_cuda_plot(py::module_& m) {
  m.def("device_pointer", &device_pointer, py::arg("host"));
  m.def("plot_lookup", &plot_lookup, py::arg("input_ids"), py::arg("num_tokens"), py::arg("sequence_offsets"),
        py::arg("num_sequences"), py::arg("indexes"), py::arg("chains"), py::arg("chain_width"), py::arg("window"),
        py::arg("references"), py::arg("fault"), py::arg("stream"), WithoutLock());
  m.def("plot_merge", &plot_merge, py::arg("input_ids"), py::arg("num_tokens"), py::arg("sequence_offsets"),
        py::arg("num_sequences"), py::arg("references"), py::arg("row_tables"), py::arg("unigram_tables"),
        py::arg("sequence_unigram_tables"), py::arg("data_type"), py::arg("position_embeddings"),
        py::arg("num_positions"), py::arg("layer_norm_weight"), py::arg("layer_norm_bias"), py::arg("layer_norm_eps"),
        py::arg("window"), py::arg("hidden_size"), py::arg("output"), py::arg("fault"), py::arg("stream"),
        WithoutLock());
}

}  // namespace hmi::bindings
