// Adapters on tensor cores for adapters of few ranks: one block of four warps for 16 tokens of a segment. Each
// warp has every fourth slice of 64 columns, of the inputs and later of the outputs, and a ring of stages of its own: a
// block waits for all its warps twice in all, and not once a chunk as that of grouped_adapter_tiles.cuh does.
//
//   inputs [rows, 64] --.                      outputs [rows, 64] --.
//   down [64, ranks] ---+--> partial sums      up [ranks, 64] ------+--> + scale * (sums + bias) --> outputs
//   (a warp's ring)          of four warps,    (same ring)          |    in place in the stage, or, if a layer norm
//                            then inner [rows, ranks] in shared ----'    follows, in rows kept until its end
//
// The first inputs are under way before it is known which adapter they meet. What a lane copies and multiplies lies at
// the same places of every stage, so that these are computed once: on few ranks addresses take more time than products.
#pragma once

#include "cuda/adapter_layer_norm.cuh"
#include "cuda/grouped_adapter_pipeline.cuh"

namespace hmi::cuda {

template <int kRankClassOfSlice, int kStagesOfSlice>
struct Slice {
  static constexpr int kRows = kTensorTile;
  static constexpr int kRankClass = kRankClassOfSlice;
  static constexpr int kStages = kStagesOfSlice;
  static constexpr int kChunk = kSliceColumns;
  static constexpr int kWarps = kSliceWarps;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kGroups = kRankClass / kTensorTile;
  static constexpr int kLogChunkUnits = 3;
  static constexpr int kLogInnerUnits = kRankClass == 16 ? 1 : kRankClass == 32 ? 2 : 3;
  static constexpr int kStride = kWarps * kChunk;  // columns from one slice of a warp to its next
  static_assert(kUnitElements << kLogChunkUnits == kChunk && kUnitElements << kLogInnerUnits == kRankClass);
};

constexpr int kWarpBytes = kWarpSize * 16;  // that a warp copies at once: four lines of shared memory

// The place of the unit that a lane copies first, in a swizzled tile; `pass` times 32 units further lies the next.
template <int kLogUnits>
__device__ __forceinline__ int copied_place(int pass) {
  const int lane = threadIdx.x % kWarpSize, line = lane / 8, row_unit = lane & ((1 << kLogUnits) - 1);
  const int first = (lane - row_unit + (row_unit ^ (line & ((1 << kLogUnits) - 1)))) * 16;
  return (kLogUnits == 3 && pass % 2 == 1 ? first ^ 64 : first) + pass * kWarpBytes;
}

// The place of what a lane gives to ldmatrix: of 16 rows, the first 16 columns. 16 columns further it is another by
// `^ kNextColumns`; 16 rows further, by the size of as many rows.
template <int kLogUnits>
__device__ __forceinline__ int matrix_place() {
  const int row = threadIdx.x % 16, unit = threadIdx.x % kWarpSize / 16;
  const int line = row >> (3 - kLogUnits);
  return ((row << kLogUnits) + (unit ^ (line & ((1 << kLogUnits) - 1)))) * 16;
}
constexpr int kNextColumns = 32;

// Walks over a warp's slices of output columns of the projections that change something.
template <class Element, class SliceType>
struct SliceCursor {
  int projection = 0;
  int column = 0;

  __device__ __forceinline__ void begin(const TileWork<Element>& work, int num_projections) {
    column = first_column();
    find(work, num_projections);
  }
  __device__ __forceinline__ void advance(const TileWork<Element>& work, int num_projections) {
    column += SliceType::kStride;
    find(work, num_projections);
  }

 private:
  __device__ __forceinline__ static int first_column() {
    return static_cast<int>(threadIdx.x) / kWarpSize * SliceType::kChunk;
  }
  __device__ __forceinline__ void find(const TileWork<Element>& work, int num_projections) {
    while (projection < num_projections &&
           (work.projections[projection].rank == 0 || column >= work.projections[projection].output_size)) {
      ++projection;
      column = first_column();
    }
  }
};

// Starts a warp's copies of [rows, 64 columns]; `from` is the lane's unit in row lane / 8. Rows that are not there are
// left as they are: no other row's result depends on them.
template <class Element, class SliceType>
__device__ __forceinline__ void copy_slice(unsigned char* to, const Element* from, int64_t stride, int num_rows,
                                           bool is_valid) {
  const int row = threadIdx.x % kWarpSize / 8;
#pragma unroll
  for (int pass = 0; pass < SliceType::kRows / 4; ++pass) {
    if (row + pass * 4 < num_rows) cp_async16(to + copied_place<3>(pass), from + pass * 4 * stride, is_valid);
  }
}

// A warp's copies, in the order of use. Groups of copies are chunks: wait_for_slice counts on it.
template <class Element, class SliceType>
class SliceLoader {
 public:
  __device__ __forceinline__ explicit SliceLoader(const Block<Element, SliceType>& block)
      : block_(block),
        stages_(block.stage(static_cast<int>(threadIdx.x) / kWarpSize * SliceType::kStages)),
        depth_(static_cast<int>(threadIdx.x) / kWarpSize * SliceType::kChunk) {
    const int lane = threadIdx.x % kWarpSize;
    inputs_ = block.inputs + lane / 8 * block.arguments.input_stride + lane % 8 * kUnitElements;
  }

  // Before anybody knows the adapter; `rows` of the tile are known.
  __device__ __forceinline__ void load_inputs_ahead(int rows) {
#pragma unroll
    for (int stage = 0; stage < SliceType::kStages - 1; ++stage) {
      load_inputs(stage, depth_ + stage * SliceType::kStride, rows);
    }
  }

  // When the adapter is known: the weights of the inputs that are under way.
  __device__ __forceinline__ void begin() {
    constexpr int kUnits = 1 << SliceType::kLogInnerUnits;
    const TileWork<Element>& work = block_.work;
    const int lane = threadIdx.x % kWarpSize;
    outputs_.begin(work, block_.arguments.num_projections);
#pragma unroll
    for (int p = 0; p < kMaxProjections; ++p) {
      if (p >= block_.arguments.num_projections) break;
      const TileProjection<Element>& projection = work.projections[p];
      const int rank = lane % kUnits * kUnitElements - projection.inner_begin;
      if (rank < 0 || rank >= projection.rank) continue;
      down_ = projection.down + rank + int64_t{depth_ + lane / kUnits} * projection.rank;
      down_pitch_ = projection.rank;
    }
    copy_down_bias(block_);
#pragma unroll
    for (int stage = 0; stage < SliceType::kStages - 1; ++stage) load_next(true);
  }

  // Starts the copies of the next chunk into the stage that was used longest ago.
  __device__ __forceinline__ void load_next(bool has_inputs = false) {
    if (depth_ < block_.arguments.input_size) {
      if (!has_inputs) load_inputs(stage_, depth_, block_.work.rows);
      load_down();
      depth_ += SliceType::kStride;
    } else if (outputs_.projection < block_.arguments.num_projections) {
      load_up();
      outputs_.advance(block_.work, block_.arguments.num_projections);
    }
    cp_async_commit();
    stage_ = stage_ + 1 == SliceType::kStages ? 0 : stage_ + 1;
  }

 private:
  __device__ __forceinline__ unsigned char* stage(int number) const {
    return stages_ + number * block_.memory.stage_bytes;
  }

  __device__ __forceinline__ void load_inputs(int number, int depth, int rows) {
    const int size = block_.arguments.input_size;
    const int column = depth + static_cast<int>(threadIdx.x) % 8 * kUnitElements;
    if (column >= round_up(size, kTensorTile)) return;
    copy_slice<Element, SliceType>(stage(number) + block_.memory.weights_bytes, inputs_ + depth,
                                   block_.arguments.input_stride, rows, column < size);
  }

  __device__ __forceinline__ void load_down() {
    if (down_ == nullptr) return;
    constexpr int kRowsAtOnce = kWarpSize >> SliceType::kLogInnerUnits;
    const int left = block_.arguments.input_size - depth_ -
                     (static_cast<int>(threadIdx.x) % kWarpSize >> SliceType::kLogInnerUnits);
    const int padded = left + block_.arguments.input_size % kTensorTile;  // sizes are multiples of 8
#pragma unroll
    for (int pass = 0; pass < SliceType::kChunk / kRowsAtOnce; ++pass) {
      const int row = pass * kRowsAtOnce;
      if (row < padded) {
        cp_async16(stage(stage_) + copied_place<SliceType::kLogInnerUnits>(pass), down_ + row * down_pitch_,
                   row < left);
      }
    }
    down_ += int64_t{SliceType::kStride} * down_pitch_;
  }

  __device__ __forceinline__ void load_up() {
    const TileProjection<Element>& projection = block_.work.projections[outputs_.projection];
    const int lane = threadIdx.x % kWarpSize, row = lane / 8, rank = projection.rank;
    const int size = projection.output_size, column = outputs_.column + lane % 8 * kUnitElements;
    if (column >= size) return;
    unsigned char* weights = stage(stage_);
    unsigned char* columns = block_.has_layer_norm() ? block_.finished(outputs_.column).bytes
                                                     : weights + block_.memory.weights_bytes;
    const int64_t stride = block_.arguments.output_stride;
    copy_slice<Element, SliceType>(columns, block_.outputs + projection.output_begin + row * stride + column, stride,
                                   block_.work.rows, true);
    const Element* up = projection.up + int64_t{row} * size + column;
    const int padded = round_up(rank, kTensorTile);
#pragma unroll
    for (int pass = 0; pass < SliceType::kRankClass / 4; ++pass) {
      if (row + pass * 4 < padded) {
        cp_async16(weights + copied_place<3>(pass), up + int64_t{pass * 4} * size, row + pass * 4 < rank);
      }
    }
    if (projection.up_bias != nullptr && lane < 8) {
      cp_async16(weights + block_.memory.weights_bytes + block_.memory.columns_bytes + lane * 16,
                 projection.up_bias + column);
    }
  }

  const Block<Element, SliceType>& block_;
  unsigned char* stages_;  // this warp's
  int stage_ = 0;
  int depth_;  // of this warp's next chunk of the first product
  SliceCursor<Element, SliceType> outputs_{};
  const Element* inputs_;
  // Of the down matrices this lane copies one unit of every so many rows.
  const Element* down_ = nullptr;
  int down_pitch_ = 0;
};

// Waits for the oldest chunk of this warp; after it the stage used before is free.
template <class SliceType>
__device__ __forceinline__ void wait_for_slice() {
  cp_async_wait<SliceType::kStages - 2>();
  __syncwarp();
}

template <class SliceType>
struct SliceSums {
  float sums[SliceType::kGroups][2][4] = {};
};

// One chunk's share of inputs @ down. kIsWhole: all its columns and all groups are there, and nothing has to be asked.
template <class Element, class SliceType, bool kIsWhole>
__device__ __forceinline__ void multiply_slice_down(const unsigned char* weights, const unsigned char* inputs,
                                                    int groups, int left, SliceSums<SliceType>& inner) {
  constexpr int kWeightBytes = SliceType::kRankClass * 2;
  const int row_place = matrix_place<3>(), weight_place = matrix_place<SliceType::kLogInnerUnits>();
#pragma unroll
  for (int step = 0; step < SliceType::kChunk / kTensorTile; ++step) {
    if (!kIsWhole && step * kTensorTile >= left) break;
    unsigned rows[4], columns[SliceType::kGroups][4];
    ldmatrix_x4(rows, inputs + (row_place ^ step * kNextColumns));
#pragma unroll
    for (int g = 0; g < SliceType::kGroups; ++g) {
      const unsigned char* operand = weights + (weight_place ^ g * kNextColumns) + step * kTensorTile * kWeightBytes;
      if (kIsWhole || g < groups) ldmatrix_x4_transposed(columns[g], operand);
    }
#pragma unroll
    for (int g = 0; g < SliceType::kGroups; ++g) {
      if (kIsWhole || g < groups) multiply_add<Element>(inner.sums[g], rows, columns[g]);
    }
  }
}

// Where a lane's four sums of a fragment (8 columns of 16 rows) lie, of one of the warps.
template <class Element, class SliceType>
__device__ __forceinline__ unsigned char* partial_sum(const Block<Element, SliceType>& block, int warp, int group,
                                                      int half) {
  const int fragment = (warp * SliceType::kGroups + group) * 2 + half;
  return block.shared + block.memory.partial_sums +
         (fragment * kWarpSize + threadIdx.x % kWarpSize) * sizeof(Vector16<float>);
}

template <class Element, class SliceType>
__device__ __forceinline__ void store_partial_sums(const Block<Element, SliceType>& block, int groups,
                                                   const SliceSums<SliceType>& inner) {
  const int warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int g = 0; g < SliceType::kGroups; ++g) {
    if (g >= groups) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float(&sums)[4] = inner.sums[g][half];
      store_unit(partial_sum(block, warp, g, half), pack(Vector16<float>{{sums[0], sums[1], sums[2], sums[3]}}));
    }
  }
}

// Adds the warps' sums, in their order; bias, activation, rounding: the inner state. Columns that only pad become zero,
// so that an infinity in the inputs cannot make a NaN of them.
template <class Element, class SliceType>
__device__ __forceinline__ void finish_slice_inner(const Block<Element, SliceType>& block, int groups) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const SwizzledTile to{block.shared + block.memory.inner, SliceType::kLogInnerUnits};
  for (int fragment = warp; fragment < groups * 2; fragment += SliceType::kWarps) {
    const int half = fragment % 2, group = fragment / 2;
    float sums[4] = {};
#pragma unroll
    for (int other = 0; other < SliceType::kWarps; ++other) {
      const Vector16<float> more = unpack<float>(load_unit(partial_sum(block, other, group, half)));
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += more.elements[k];
    }
    const int column = group * kTensorTile + half * 8 + lane % 4 * 2;
    const bool is_real = half == 0 || (block.work.half_groups >> group & 1) == 0;
    float2 bias = {0.0f, 0.0f};
    if (block.work.down_bias != nullptr && is_real) {
      bias = load_pair<Element>(block.shared + block.memory.down_bias + column * sizeof(Element));
    }
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const float first = activate(block.work.activation, sums[2 * lower] + bias.x);
      const float second = activate(block.work.activation, sums[2 * lower + 1] + bias.y);
      unsigned char* pair = to.unit(lower * 8 + lane / 4, column / kUnitElements) +
                            column % kUnitElements * sizeof(Element);
      store_pair<Element>(pair, is_real ? first : 0.0f, is_real ? second : 0.0f);
    }
  }
}

// Outputs of one chunk as the matrices that tensor cores' sums are: pairs of neighbouring columns, see ldmatrix_x4.
template <class SliceType>
struct SlicePairs {
  static constexpr int kColumnGroups = SliceType::kChunk / kTensorTile;
  unsigned pairs[kColumnGroups][4];
};

// outputs + scale * (inner @ up + bias) of one chunk, rounded once.
template <class Element, class SliceType>
__device__ __forceinline__ void add_to_slice(const unsigned char* inner, int first_group, const unsigned char* weights,
                                             const unsigned char* up_bias, const unsigned char* outputs, int steps,
                                             float scale, SlicePairs<SliceType>& result) {
  constexpr int kColumnGroups = SlicePairs<SliceType>::kColumnGroups;
  constexpr int kRowBytes = SliceType::kChunk * 2;
  const int row_place = matrix_place<3>(), inner_place = matrix_place<SliceType::kLogInnerUnits>();
  float sums[kColumnGroups][2][4] = {};
#pragma unroll
  for (int step = 0; step < SliceType::kGroups; ++step) {
    if (step >= steps) break;
    unsigned rows[4];
    ldmatrix_x4(rows, inner + (inner_place ^ (first_group + step) * kNextColumns));
#pragma unroll
    for (int g = 0; g < kColumnGroups; ++g) {
      unsigned columns[4];
      ldmatrix_x4_transposed(columns, weights + (row_place ^ g * kNextColumns) + step * kTensorTile * kRowBytes);
      multiply_add<Element>(sums[g], rows, columns);
    }
  }
#pragma unroll
  for (int g = 0; g < kColumnGroups; ++g) {
    float2 bias[2] = {};
    if (up_bias != nullptr) {
      const unsigned char* pairs = up_bias + g * 32 + threadIdx.x % 4 * 4;
      bias[0] = load_pair<Element>(pairs);
      bias[1] = load_pair<Element>(pairs + 16);
    }
    unsigned(&pairs)[4] = result.pairs[g];
    ldmatrix_x4(pairs, outputs + (row_place ^ g * kNextColumns));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 before = unpack_pair<Element>(pairs[i]);
      const float* more = &sums[g][i / 2][i % 2 * 2];
      pairs[i] = pack_pair<Element>(before.x + scale * (more[0] + bias[i / 2].x),
                                    before.y + scale * (more[1] + bias[i / 2].y));
    }
  }
}

template <class SliceType>
__device__ __forceinline__ void write_slice(unsigned char* to, const SlicePairs<SliceType>& from) {
  const int row_place = matrix_place<3>();
#pragma unroll
  for (int g = 0; g < SlicePairs<SliceType>::kColumnGroups; ++g) {
    stmatrix_x4(to + (row_place ^ g * kNextColumns), from.pairs[g]);
  }
}

template <class Element, class SliceType>
__device__ __forceinline__ void store_slice(const unsigned char* from, Element* to, int64_t stride, int num_rows,
                                            int columns_left) {
  const int lane = threadIdx.x % kWarpSize, row = lane / 8, column = lane % 8 * kUnitElements;
  if (column >= columns_left) return;
  to += row * stride + column;
#pragma unroll
  for (int pass = 0; pass < SliceType::kRows / 4; ++pass) {
    if (row + pass * 4 < num_rows) store16(to + pass * 4 * stride, load_unit(from + copied_place<3>(pass)));
  }
}

// A warp's way through the chunks of its ring.
template <class Element, class SliceType>
struct SliceRing {
  const Block<Element, SliceType>& block;
  SliceLoader<Element, SliceType>& loader;
  int number = 0;

  // The oldest chunk, when it is there; those after it are on their way.
  __device__ __forceinline__ unsigned char* next() {
    wait_for_slice<SliceType>();
    loader.load_next();
    unsigned char* stage = block.stage(static_cast<int>(threadIdx.x) / kWarpSize * SliceType::kStages + number);
    number = number + 1 == SliceType::kStages ? 0 : number + 1;
    return stage;
  }
};

template <class Element, class SliceType>
__device__ __forceinline__ void make_inner(const Block<Element, SliceType>& block,
                                           SliceRing<Element, SliceType>& ring) {
  const int warp = threadIdx.x / kWarpSize, groups = block.work.inner_columns / kTensorTile;
  SliceSums<SliceType> inner;
  for (int depth = warp * SliceType::kChunk; depth < block.arguments.input_size; depth += SliceType::kStride) {
    const unsigned char* weights = ring.next();
    const unsigned char* inputs = weights + block.memory.weights_bytes;
    const int left = block.arguments.input_size - depth;
    if (left >= SliceType::kChunk && groups == SliceType::kGroups) {
      multiply_slice_down<Element, SliceType, true>(weights, inputs, groups, left, inner);
    } else {
      multiply_slice_down<Element, SliceType, false>(weights, inputs, groups, left, inner);
    }
  }
  store_partial_sums(block, groups, inner);
  __syncthreads();
  finish_slice_inner(block, groups);
  __syncthreads();
}

// The new outputs of a chunk that has come.
template <class Element, class SliceType>
__device__ __forceinline__ void make_outputs(const Block<Element, SliceType>& block, const unsigned char* stage,
                                             const unsigned char* outputs, int number,
                                             SlicePairs<SliceType>& result) {
  const TileProjection<Element>& projection = block.work.projections[number];
  const unsigned char* up_bias = stage + block.memory.weights_bytes + block.memory.columns_bytes;
  add_to_slice<Element>(block.shared + block.memory.inner, projection.inner_begin / kTensorTile, stage,
                        projection.up_bias == nullptr ? nullptr : up_bias, outputs,
                        round_up(projection.rank, kTensorTile) / kTensorTile, projection.scale, result);
}

template <class Element, class SliceType>
__device__ __forceinline__ void add_to_outputs_by_slices(const Block<Element, SliceType>& block,
                                                         SliceRing<Element, SliceType>& ring) {
  const int num_projections = block.arguments.num_projections;
  SliceCursor<Element, SliceType> cursor{};
  for (cursor.begin(block.work, num_projections); cursor.projection < num_projections;
       cursor.advance(block.work, num_projections)) {
    unsigned char* stage = ring.next();
    unsigned char* outputs =
        block.has_layer_norm() ? block.finished(cursor.column).bytes : stage + block.memory.weights_bytes;
    SlicePairs<SliceType> result;
    make_outputs(block, stage, outputs, cursor.projection, result);
    __syncwarp();  // every lane has read what is now written
    write_slice(outputs, result);
    if (block.has_layer_norm()) continue;
    __syncwarp();
    const TileProjection<Element>& projection = block.work.projections[cursor.projection];
    store_slice<Element, SliceType>(outputs, block.outputs + projection.output_begin + cursor.column,
                                    block.arguments.output_stride, block.work.rows,
                                    projection.output_size - cursor.column);
  }
}

template <class Element, class SliceType>
__global__ void __launch_bounds__(SliceType::kThreads, 4)
    adapter_slices_kernel(const GroupedAdapterArguments arguments) {
  HMI_DYNAMIC_SHARED(shared);
  HMI_SHARED(TileWork<Element>, work);
  const SegmentTile tile = find_tile(arguments, SliceType::kRows);
  if (tile.segment < 0) return;
  const int layer_norm_size = arguments.layer_norm_weight != nullptr ? arguments.output_sizes[0] : 0;
  const Block<Element, SliceType> block{
      arguments,
      work,
      shared,
      slice_memory(SliceType::kRankClass, SliceType::kStages, layer_norm_size),
      SliceType::kStages,
      static_cast<const Element*>(arguments.inputs) + tile.row * arguments.input_stride,
      static_cast<Element*>(arguments.outputs) + tile.row * arguments.output_stride};
  SliceLoader<Element, SliceType> loader(block);
  loader.load_inputs_ahead(tile.rows);
  if (threadIdx.x == 0) describe_work(arguments, tile, work);
  __syncthreads();
  if (work.rows == 0 || work.inner_columns == 0) {  // nobody reads the inputs
    cp_async_commit();
    cp_async_wait<0>();
    if (work.rows == 0) return;
    copy_rows(block);
  } else {
    loader.begin();
    SliceRing<Element, SliceType> ring{block, loader};
    make_inner(block, ring);
    add_to_outputs_by_slices(block, ring);
  }
  if (block.has_layer_norm()) normalize_rows(block);
}

}  // namespace hmi::cuda
