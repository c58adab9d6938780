// What decoders need beside the rest: look-up by the tokens before, and attention over a paged cache.
#include "bindings/row_tables.h"
#include "cpu/causal_plot.h"
#include "cpu/paged_attention.h"

namespace hmi::bindings {
namespace {

void causal_lookup(Address windows, int64_t num_tokens, const std::vector<NumberedIndex>& indexes, Address chains,
                   int64_t num_chains, int64_t chain_width, Address token_chains, Address references,
                   int num_threads) {
  const std::vector<hmi::PlotIndex> converted = plot_indexes(indexes);
  hmi::causal_lookup({pointer<const int32_t>(windows), num_tokens, converted, pointer<const int32_t>(chains),
                      num_chains, chain_width, pointer<const int32_t>(token_chains), pointer<int64_t>(references)},
                     num_threads);
}

void causal_merge(Address input_ids, Address positions, Address references, int64_t num_tokens,
                  const std::vector<NumberedTable>& rows, const std::vector<NumberedTable>& unigrams,
                  Address token_unigram_tables, Address position_embeddings, int64_t num_positions,
                  Address layer_norm_weight, Address layer_norm_bias, float layer_norm_eps, int64_t hidden_size,
                  Address output, int num_threads) {
  hmi::causal_merge(
      {pointer<const int32_t>(input_ids), pointer<const int64_t>(positions), pointer<const int64_t>(references),
       num_tokens, row_tables(rows), row_tables(unigrams), pointer<const int32_t>(token_unigram_tables),
       pointer<const float>(position_embeddings), num_positions, pointer<const float>(layer_norm_weight),
       pointer<const float>(layer_norm_bias), layer_norm_eps, hidden_size, pointer<float>(output)},
      num_threads);
}

void paged_attention(Address query, int64_t query_stride, Address key, int64_t key_stride, Address value,
                     int64_t value_stride, Address output, int64_t output_stride, Address key_cache,
                     Address value_cache, int64_t num_blocks, int64_t block_size, Address block_tables,
                     int64_t table_width, Address query_offsets, Address context_lengths, int64_t num_sequences,
                     int64_t num_queries, int64_t num_heads, int64_t head_size, int num_threads) {
  hmi::paged_attention(
      {pointer<const float>(query), query_stride, pointer<const float>(key), key_stride, pointer<const float>(value),
       value_stride, pointer<float>(output), output_stride, pointer<float>(key_cache), pointer<float>(value_cache),
       num_blocks, block_size, pointer<const int32_t>(block_tables), table_width, pointer<const int64_t>(query_offsets),
       pointer<const int64_t>(context_lengths), num_sequences, num_queries, num_heads, head_size},
      num_threads);
}

}  // namespace

void define_decoding(py::module_& m) {
  m.def("causal_lookup", &causal_lookup, py::arg("windows"), py::arg("num_tokens"), py::arg("indexes"),
        py::arg("chains"), py::arg("num_chains"), py::arg("chain_width"), py::arg("token_chains"),
        py::arg("references"), py::arg("num_threads"), WithoutLock());
  m.def("causal_merge", &causal_merge, py::arg("input_ids"), py::arg("positions"), py::arg("references"),
        py::arg("num_tokens"), py::arg("row_tables"), py::arg("unigram_tables"), py::arg("token_unigram_tables"),
        py::arg("position_embeddings"), py::arg("num_positions"), py::arg("layer_norm_weight"),
        py::arg("layer_norm_bias"), py::arg("layer_norm_eps"), py::arg("hidden_size"), py::arg("output"),
        py::arg("num_threads"), WithoutLock());
  m.def("paged_attention", &paged_attention, py::arg("query"), py::arg("query_stride"), py::arg("key"),
        py::arg("key_stride"), py::arg("value"), py::arg("value_stride"), py::arg("output"), py::arg("output_stride"),
        py::arg("key_cache"), py::arg("value_cache"), py::arg("num_blocks"), py::arg("block_size"),
        py::arg("block_tables"), py::arg("table_width"), py::arg("query_offsets"), py::arg("context_lengths"),
        py::arg("num_sequences"), py::arg("num_queries"), py::arg("num_heads"), py::arg("head_size"),
        py::arg("num_threads"), WithoutLock());
}

}  // namespace hmi::bindings
