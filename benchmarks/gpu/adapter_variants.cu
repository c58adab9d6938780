// Every shape of the adapter kernels beside each other, without Python: which to take for which call, and how far from
// the memory's best it is. Prints microseconds of one launch, the median of ten, caches flushed before each.
//
//   nvcc -std=c++17 -O3 -arch=sm_90 --expt-relaxed-constexpr -I csrc benchmarks/gpu/adapter_variants.cu -o variants
//   ./variants        all problems;   ./variants 3        the third, for a profiler
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/grouped_adapter_slices.cuh"
#include "cuda/grouped_adapter_tiles.cuh"

using namespace hmi::cuda;
using Element = __half;

namespace {

constexpr double kBytesPerSecond = 4.08e12;  // a copy within an H200's memory, read and written
constexpr size_t kFlushBytes = size_t{120} << 20;  // twice the second-level cache
constexpr int kMaxSharedBytesOfHopper = 226 * 1024;
constexpr int kWarmUp = 4, kSamples = 10;

struct Problem {
  int hidden_size, rank, segments, tokens_per_segment;
  bool is_bottleneck;  // with biases, GELU and a layer norm; else LoRA
};
constexpr Problem kProblems[] = {
    {768, 16, 32, 64, false},  {768, 16, 32, 64, true},   {768, 16, 128, 64, false},  {768, 16, 128, 64, true},
    {768, 64, 128, 64, false}, {768, 64, 128, 64, true},  {768, 16, 256, 8, false},   {768, 16, 256, 8, true},
    {4096, 16, 32, 64, false}, {4096, 16, 32, 64, true},  {768, 16, 8, 512, false},   {768, 16, 8, 512, true},
    {384, 16, 128, 64, false}, {384, 16, 128, 64, true},  {768, 16, 512, 64, false},  {768, 16, 512, 64, true},
    {768, 128, 128, 64, false}, {768, 128, 128, 64, true},
};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) { check(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc"); }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "to the device");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> copied(size_);
    check(cudaMemcpy(copied.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "to the host");
    return copied;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Numbers from -scale to scale.
__global__ void fill(Element* to, int64_t size, unsigned seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += int64_t{gridDim.x} * blockDim.x) {
    unsigned x = static_cast<unsigned>(i) * 2654435761u + seed;
    x = (x ^ x >> 16) * 0x85ebca6bu;
    x = (x ^ x >> 13) * 0xc2b2ae35u;
    to[i] = __float2half((((x ^ x >> 16) & 0xffff) / 32768.0f - 1.0f) * scale);
  }
}

// What is right, a block a token, in float32, rounded where the kernels round.
__global__ void reference(GroupedAdapterArguments a, int tokens_per_segment, int rank, float* result) {
  extern __shared__ float inner[];
  float* row = inner + rank;
  const int token = blockIdx.x, size = a.input_size;
  const int64_t offset = a.slot_offsets[a.segment_slots[token / tokens_per_segment]];
  const bool is_bottleneck = a.slot_activations != nullptr;
  const auto* down = static_cast<const Element*>(a.arena) + offset;
  const auto* down_bias = down + int64_t{size} * rank;
  const auto* up = down_bias + (is_bottleneck ? rank : 0);
  const auto* up_bias = up + int64_t{rank} * size;
  const auto* inputs = static_cast<const Element*>(a.inputs) + int64_t{token} * size;
  const auto* outputs = static_cast<const Element*>(a.outputs) + int64_t{token} * size;
  const auto rounded = [](float value) { return __half2float(__float2half(value)); };
  for (int r = threadIdx.x; r < rank; r += blockDim.x) {
    float sum = is_bottleneck ? __half2float(down_bias[r]) : 0.0f;
    for (int k = 0; k < size; ++k) sum += __half2float(inputs[k]) * __half2float(down[int64_t{k} * rank + r]);
    inner[r] = rounded(is_bottleneck ? activate(kGelu, sum) : sum);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < size; c += blockDim.x) {
    float sum = is_bottleneck ? __half2float(up_bias[c]) : 0.0f;
    for (int r = 0; r < rank; ++r) sum += inner[r] * __half2float(up[int64_t{r} * size + c]);
    row[c] = rounded(__half2float(outputs[c]) + sum);
  }
  __syncthreads();
  float mean = 0.0f, variance = 0.0f;
  for (int c = 0; c < size; ++c) mean += row[c] / size;
  for (int c = 0; c < size; ++c) variance += (row[c] - mean) * (row[c] - mean) / size;
  const auto* weight = static_cast<const Element*>(a.layer_norm_weight);
  const auto* bias = static_cast<const Element*>(a.layer_norm_bias);
  for (int c = threadIdx.x; c < size; c += blockDim.x) {
    const float normal = (row[c] - mean) * rsqrtf(variance + a.layer_norm_epsilon);
    result[int64_t{token} * size + c] =
        is_bottleneck ? normal * __half2float(weight[c]) + __half2float(bias[c]) : row[c];
  }
}

template <class Kernel, class... Arguments>
cudaError_t launch_blocks(Kernel kernel, const GroupedAdapterArguments& a, int rows, int threads, int bytes,
                          Arguments... arguments) {
  if (bytes > kMaxSharedBytesOfHopper) return cudaErrorInvalidValue;
  const auto blocks = static_cast<unsigned>(num_segment_tiles(a.num_tokens, a.num_segments, rows));
  return launch(kernel, dim3(blocks), dim3(threads), static_cast<size_t>(bytes), nullptr, a, arguments...);
}

int layer_norm_size(const GroupedAdapterArguments& a) { return a.layer_norm_weight ? a.output_sizes[0] : 0; }

template <int kRows, int kRanks>
cudaError_t tiles(const GroupedAdapterArguments& a, int stages) {
  using Shape = Tile<kRows, kRanks, 64>;
  const int bytes = tile_memory(Shape::shape(), stages, layer_norm_size(a)).total;
  return launch_blocks(adapter_tiles_kernel<Element, Shape>, a, kRows, Shape::kThreads, bytes, stages);
}

template <int kRanks, int kStages>
cudaError_t slices(const GroupedAdapterArguments& a) {
  using Shape = Slice<kRanks, kStages>;
  const int bytes = slice_memory(kRanks, kStages, layer_norm_size(a)).total;
  return launch_blocks(adapter_slices_kernel<Element, Shape>, a, Shape::kRows, Shape::kThreads, bytes);
}

// The inputs of a problem, and what comes out.
class Bench {
 public:
  explicit Bench(const Problem& problem)
      : problem_(problem),
        tokens_(int64_t{problem.segments} * problem.tokens_per_segment),
        block_size_(block_size(problem)),
        inputs_(tokens_ * problem.hidden_size),
        start_(tokens_ * problem.hidden_size),
        outputs_(tokens_ * problem.hidden_size),
        arena_(block_size_ * problem.segments),
        layer_norm_(2 * problem.hidden_size),
        flush_(kFlushBytes),
        offsets_(multiples(problem.segments + 1, problem.tokens_per_segment)),
        slot_offsets_(multiples(problem.segments, block_size_)),
        slots_(numbers(problem.segments)),
        ranks_(std::vector<int32_t>(problem.segments, problem.rank)),
        activations_(std::vector<int32_t>(problem.segments, kGelu)),
        scales_(std::vector<float>(problem.segments, 1.0f)) {
    fill<<<264, 256>>>(inputs_.get(), tokens_ * problem.hidden_size, 1, 1.0f);
    fill<<<264, 256>>>(start_.get(), tokens_ * problem.hidden_size, 2, 1.0f);
    fill<<<264, 256>>>(arena_.get(), block_size_ * problem.segments, 3, 0.1f);
    fill<<<264, 256>>>(layer_norm_.get(), 2 * problem.hidden_size, 4, 1.0f);
    DeviceArray<float> right(tokens_ * problem.hidden_size);
    arguments_ = describe();
    arguments_.outputs = start_.get();
    reference<<<static_cast<unsigned>(tokens_), 128, (problem.rank + problem.hidden_size) * sizeof(float)>>>(
        arguments_, problem.tokens_per_segment, problem.rank, right.get());
    check(cudaDeviceSynchronize(), "reference");
    expected_ = right.values();
    arguments_.outputs = outputs_.get();
    std::printf("hidden %d, rank %d, %d x %d tokens, %s: at least %.1f us\n", problem.hidden_size, problem.rank,
                problem.segments, problem.tokens_per_segment, problem.is_bottleneck ? "bottleneck" : "LoRA",
                1e6 * least_seconds());
  }

  template <class Launch>
  void run(const std::string& name, Launch launch_variant) {
    restore();
    if (launch_variant(arguments_) != cudaSuccess) {
      std::printf("  %s: does not fit\n", name.c_str());
      return;
    }
    check(cudaDeviceSynchronize(), name.c_str());
    const double error = relative_error();
    const double microseconds = median_microseconds(launch_variant);
    std::printf("  %s: %.1f us, %.0f %%%s\n", name.c_str(), microseconds, 1e8 * least_seconds() / microseconds,
                error < 2e-3 ? "" : "  WRONG");
  }

 private:
  static int64_t block_size(const Problem& p) {
    const int64_t size = 2 * int64_t{p.hidden_size} * p.rank + (p.is_bottleneck ? p.rank + p.hidden_size : 0);
    return (size + 63) / 64 * 64;
  }
  static std::vector<int64_t> multiples(int count, int64_t step) {
    std::vector<int64_t> values(count);
    for (int i = 0; i < count; ++i) values[i] = i * step;
    return values;
  }
  static std::vector<int32_t> numbers(int count) {
    std::vector<int32_t> values(count);
    for (int i = 0; i < count; ++i) values[i] = i;
    return values;
  }

  GroupedAdapterArguments describe() const {
    GroupedAdapterArguments a{};
    a.data_type = hmi::DataType::kFloat16;
    a.output_stride = a.input_stride = a.input_size = a.output_sizes[0] = problem_.hidden_size;
    a.inputs = inputs_.get();
    a.num_tokens = tokens_;
    a.num_projections = 1;
    a.arena = arena_.get();
    a.arena_size = block_size_ * problem_.segments;
    a.segment_offsets = offsets_.get();
    a.segment_slots = slots_.get();
    a.num_segments = a.num_slots = problem_.segments;
    a.slot_offsets = slot_offsets_.get();
    a.slot_ranks = ranks_.get();
    a.slot_scales = scales_.get();
    a.max_rank = problem_.rank;
    a.layer_norm_epsilon = 1e-12f;
    if (problem_.is_bottleneck) {
      a.slot_activations = activations_.get();
      a.layer_norm_weight = layer_norm_.get();
      a.layer_norm_bias = layer_norm_.get() + problem_.hidden_size;
    }
    return a;
  }

  double least_seconds() const {
    const double rows = 3.0 * tokens_ * problem_.hidden_size, weights = 1.0 * block_size_ * problem_.segments;
    return 2.0 * (rows + weights) / kBytesPerSecond;
  }
  void restore() {
    check(cudaMemcpyAsync(outputs_.get(), start_.get(), tokens_ * problem_.hidden_size * 2, cudaMemcpyDeviceToDevice),
          "start");
  }
  double relative_error() const {
    const std::vector<Element> got = outputs_.values();
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += std::pow(__half2float(got[i]) - expected_[i], 2);
      norm += std::pow(expected_[i], 2);
    }
    return std::sqrt(difference / norm);
  }
  template <class Launch>
  double median_microseconds(Launch launch_variant) {
    cudaEvent_t begin, end;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    std::vector<float> samples;
    for (int i = 0; i < kWarmUp + kSamples; ++i) {
      restore();
      check(cudaMemsetAsync(flush_.get(), i, kFlushBytes), "flush");
      cudaEventRecord(begin);
      launch_variant(arguments_);
      cudaEventRecord(end);
      check(cudaEventSynchronize(end), "a sample");
      float milliseconds = 0.0f;
      cudaEventElapsedTime(&milliseconds, begin, end);
      if (i >= kWarmUp) samples.push_back(1e3f * milliseconds);
    }
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
  }

  Problem problem_;
  int64_t tokens_, block_size_;
  DeviceArray<Element> inputs_, start_, outputs_, arena_, layer_norm_;
  DeviceArray<unsigned char> flush_;
  DeviceArray<int64_t> offsets_, slot_offsets_;
  DeviceArray<int32_t> slots_, ranks_, activations_;
  DeviceArray<float> scales_;
  GroupedAdapterArguments arguments_{};
  std::vector<float> expected_;
};

template <int kRanks>
void run_tiles(Bench& bench) {
  for (const int stages : {2, 3, 4}) {
    const std::string ring = ", " + std::to_string(stages) + " stages";
    bench.run("tiles of 16 rows" + ring, [&](const auto& a) { return tiles<16, kRanks>(a, stages); });
    bench.run("tiles of 32 rows" + ring, [&](const auto& a) { return tiles<32, kRanks>(a, stages); });
    bench.run("tiles of 64 rows" + ring, [&](const auto& a) { return tiles<64, kRanks>(a, stages); });
  }
}

template <int kRanks>
void run_slices(Bench& bench) {
  bench.run("slices, 2 stages", slices<kRanks, 2>);
  bench.run("slices, 3 stages", slices<kRanks, 3>);
  bench.run("slices, 4 stages", slices<kRanks, 4>);
}

void run_all(const Problem& problem) {
  Bench bench(problem);
  if (problem.rank <= 16) {
    run_slices<16>(bench);
    run_tiles<16>(bench);
  } else if (problem.rank <= 64) {
    run_slices<64>(bench);
    run_tiles<64>(bench);
  } else {
    run_tiles<128>(bench);
  }
}

}  // namespace

int main(int count, char** values) {
  if (count > 1) {
    run_all(kProblems[std::atoi(values[1]) - 1]);
  } else {
    for (const Problem& problem : kProblems) run_all(problem);
  }
}
