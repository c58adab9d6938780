// One thread a token. A warp reads the ids of its 32 tokens in one piece and passes neighbors on by shuffles; every
// probe of an index is one 16-byte load, and the searches for both bigrams of a token go side by side. References leave
// as they lie in memory: three a token would be stores 24 bytes apart, so they are turned around in shared memory.
#include "common/ngram_key.h"
#include "cpu/plot_lookup.h"
#include "cuda/plot_lookup.h"
#include "cuda/sequences.cuh"

namespace hmi::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns3 = 3;  // of references for window 3: whole, left, right

__device__ __forceinline__ IndexSlot load_slot(const DeviceIndex& index, uint64_t place) {
  const uint4 bytes = load16(index.slots + place);
  IndexSlot slot;
  __builtin_memcpy(&slot, &bytes, sizeof(slot));
  return slot;
}

// The walk of one key through the indexes of a chain, one probe a step.
class ChainSearch {
 public:
  __device__ void start(const PlotLookupArguments& a, int64_t sequence, int64_t key) {
    key_ = key;
    sequence_ = sequence;
    link_ = -1;
    is_open_ = key != kNoKey;
    if (is_open_) enter_next_index(a);
  }

  __device__ bool is_open() const { return is_open_; }
  __device__ int64_t reference() const { return reference_; }
  __device__ IndexSlot load(const PlotLookupArguments& a) const { return load_slot(a.indexes[index_], place_); }

  __device__ void look_at(const PlotLookupArguments& a, const IndexSlot& slot) {
    if (slot.key == key_ && slot.row != kMissing) {
      reference_ = int64_t{index_} << kRowBits | slot.row;
      is_open_ = false;
    } else if (slot.key == key_ || slot.key == kNoKey || --probes_left_ == 0) {
      enter_next_index(a);
    } else {
      place_ = (place_ + 1) & ((uint64_t{1} << a.indexes[index_].capacity_bits) - 1);
    }
  }

 private:
  __device__ void enter_next_index(const PlotLookupArguments& a) {
    ++link_;
    index_ = link_ < a.chain_width ? a.chains[sequence_ * a.chain_width + link_] : -1;
    is_open_ = index_ >= 0 && index_ < a.num_indexes;
    if (is_open_) {
      const int64_t bits = a.indexes[index_].capacity_bits;
      place_ = mix_key(key_) >> (64 - bits);
      probes_left_ = int64_t{1} << bits;  // a damaged index may have no empty slot
    } else if (index_ != -1) {
      report_fault(a.fault, fault_word(Fault::kChains, sequence_));
    }
  }

  int64_t key_ = kNoKey;
  int64_t sequence_ = 0;
  uint64_t place_ = 0;
  int64_t probes_left_ = 0;
  int64_t reference_ = kMissing;
  int32_t link_ = -1;
  int32_t index_ = -1;
  bool is_open_ = false;
};

// references[i] = that of keys[i], or kMissing. All loads of a step are under way before the first is looked at.
template <int kKeys>
__device__ __forceinline__ void search(const PlotLookupArguments& a, int64_t sequence, const int64_t (&keys)[kKeys],
                                       int64_t (&references)[kKeys]) {
  ChainSearch searches[kKeys];
  bool any_open = false;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    searches[i].start(a, sequence, keys[i]);
    any_open |= searches[i].is_open();
  }
  while (any_open) {
    IndexSlot slots[kKeys] = {};
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (searches[i].is_open()) slots[i] = searches[i].load(a);
    }
    any_open = false;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      if (searches[i].is_open()) searches[i].look_at(a, slots[i]);
      any_open |= searches[i].is_open();
    }
  }
#pragma unroll
  for (int i = 0; i < kKeys; ++i) references[i] = searches[i].reference();
}

// A token between its neighbors; kAbsent beyond the ends of its sequence.
struct Window {
  int32_t left;
  int32_t token;
  int32_t right;
};

// Called by whole warps whose lanes hold consecutive tokens; ids come from the lanes beside where these have them.
__device__ __forceinline__ Window load_window(const int32_t* input_ids, int64_t t, int64_t num_tokens,
                                              const TokenSequence& sequence) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t id = t < num_tokens ? input_ids[t] : kAbsent;
  int32_t left = __shfl_up_sync(kFullWarp, id, 1);
  int32_t right = __shfl_down_sync(kFullWarp, id, 1);
  const bool has_left = sequence.index >= 0 && t > sequence.begin;
  const bool has_right = sequence.index >= 0 && t + 1 < sequence.end;
  if (has_left && lane == 0) left = input_ids[t - 1];
  if (has_right && lane == kWarpSize - 1) right = input_ids[t + 1];
  return {has_left ? left : kAbsent, id, has_right ? right : kAbsent};
}

__device__ __forceinline__ void look_up_bigram(const PlotLookupArguments& a, int64_t t, int64_t sequence,
                                               const Window& window) {
  const bool has_key = sequence >= 0 && window.right != kAbsent;
  const int64_t keys[1] = {has_key ? checked_ngram_key(window.token, window.right, kAbsent) : kNoKey};
  int64_t references[1];
  search(a, sequence, keys, references);
  a.references[t] = references[0];
}

// The whole window or, where it is missing, the bigrams on both sides.
__device__ __forceinline__ void look_up_trigram(const PlotLookupArguments& a, int64_t sequence, const Window& window,
                                                int64_t (&references)[kColumns3]) {
  const int64_t whole[1] = {sequence >= 0 ? checked_ngram_key(window.left, window.token, window.right) : kNoKey};
  int64_t found[1];
  search(a, sequence, whole, found);
  const bool is_missing = sequence >= 0 && found[0] == kMissing;
  const int64_t bigrams[2] = {
      is_missing && window.left != kAbsent ? checked_ngram_key(window.left, window.token, kAbsent) : kNoKey,
      is_missing && window.right != kAbsent ? checked_ngram_key(kAbsent, window.token, window.right) : kNoKey};
  int64_t sides[2];
  search(a, sequence, bigrams, sides);
  references[0] = found[0];
  references[1] = sides[0];
  references[2] = sides[1];
}

// A warp's 96 references from [token][column] in registers to consecutive addresses.
__device__ __forceinline__ void store_by_warp(const PlotLookupArguments& a, int64_t t,
                                              const int64_t (&references)[kColumns3]) {
  HMI_SHARED(int64_t, staged, [kThreads * kColumns3]);
  const int lane = threadIdx.x % kWarpSize;
  int64_t* own = staged + (threadIdx.x - lane) * kColumns3;
#pragma unroll
  for (int column = 0; column < kColumns3; ++column) own[lane * kColumns3 + column] = references[column];
  __syncwarp();
  const int64_t first = (t - lane) * kColumns3;
#pragma unroll
  for (int i = lane; i < kWarpSize * kColumns3; i += kWarpSize) {
    if (first + i < a.num_tokens * kColumns3) a.references[first + i] = own[i];
  }
}

template <int kWindow>
__global__ void __launch_bounds__(kThreads) plot_lookup_kernel(const __grid_constant__ PlotLookupArguments a) {
  HMI_SHARED(SequenceRange, range, [1]);  // from the sequence of the block's first token to that of its last
  const DeviceSequences sequences = {a.sequence_offsets, a.num_sequences, a.num_tokens};
  const int64_t first = int64_t{blockIdx.x} * kThreads;
  const int64_t last = (first + kThreads < a.num_tokens ? first + kThreads : a.num_tokens) - 1;
  if (threadIdx.x < kWarpSize) {
    const SequenceRange found = find_sequences_by_warp(sequences, first, last);
    if (threadIdx.x == 0) range[0] = found;
  }
  __syncthreads();

  const int64_t t = first + threadIdx.x;
  const bool is_token = t < a.num_tokens;
  TokenSequence sequence = {-1, 0, 0};
  if (is_token) sequence = find_sequence(sequences, range[0], t, a.fault);
  const Window window = load_window(a.input_ids, t, a.num_tokens, sequence);
  if (is_token && !is_token_id(window.token)) {
    report_fault(a.fault, fault_word(Fault::kInputIds, t));
    sequence.index = -1;
  }
  if constexpr (kWindow == 2) {
    if (is_token) look_up_bigram(a, t, sequence.index, window);
  } else {
    int64_t references[kColumns3];
    look_up_trigram(a, sequence.index, window, references);
    store_by_warp(a, t, references);
  }
  check_offsets_rise(sequences, a.fault);
}

}  // namespace

cudaError_t plot_lookup(const PlotLookupArguments& arguments, cudaStream_t stream) {
  const auto kernel = arguments.window == 2 ? plot_lookup_kernel<2> : plot_lookup_kernel<3>;
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.num_tokens, kThreads)));
  return launch(kernel, grid, dim3(kThreads), 0, stream, arguments);
}

}  // namespace hmi::cuda
