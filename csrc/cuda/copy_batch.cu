// Batches of copies. Methods loop and batch leave the work to the copy engines; method kernel lets threads load 16 bytes
// each straight from page-locked host memory and store them to device memory: the descriptions of up to 168 pieces
// travel as kernel parameters, so that hundreds of small pieces cost one launch and no copy of a table.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/copies.h"
#include "cuda/device.cuh"
#include "cuda/error.h"

namespace hmi::cuda {
namespace {

// From top to bottom, the first rule that the batch meets and whose method can be used. Measured on an H200, 2,048
// pieces of 4 KiB took 0.6 ms as a batch, 1.5 ms by the kernel and 5.2 ms one by one, 1,024 of 64 KiB 1.2, 1.5 and
// 3.9 ms; and beside matrix products the batch's time was hidden to 85 %, the kernel's to 15 %.
struct CopyRule {
  size_t min_pieces;
  int64_t max_mean_bytes;
  CopyMethod method;
};
constexpr CopyRule kCopyRules[] = {
    {2, INT64_MAX, CopyMethod::kBatch},
    {4, 64 << 10, CopyMethod::kKernel},
    {0, INT64_MAX, CopyMethod::kLoop},
};

constexpr int kThreads = 256;
constexpr int kLoadsInFlight = 4;  // of each thread: the bus answers after microseconds
constexpr int64_t kChunkBytes = int64_t{16} * kThreads * kLoadsInFlight;
constexpr int64_t kMaxBlocksPerPiece = 32;  // about 512 KiB under way: enough for the bus, few enough for the others
constexpr size_t kPiecesPerLaunch = 168;

struct PieceTable {
  Piece pieces[kPiecesPerLaunch];
};
static_assert(sizeof(PieceTable) <= 4096, "kernel parameters are limited to 4 KiB");

// Grid: [blocks a piece, pieces].
__global__ void __launch_bounds__(kThreads) gather_pieces(const PieceTable table) {
  const Piece piece = table.pieces[blockIdx.y];
  auto* const destination = static_cast<unsigned char*>(piece.destination);
  const auto* const source = static_cast<const unsigned char*>(piece.source);
  const auto addresses = reinterpret_cast<uintptr_t>(piece.destination) | reinterpret_cast<uintptr_t>(piece.source);
  const int64_t vector_bytes = addresses % 16 == 0 ? piece.bytes / 16 * 16 : 0;
  for (int64_t chunk = blockIdx.x * kChunkBytes; chunk < vector_bytes; chunk += gridDim.x * kChunkBytes) {
    uint4 loaded[kLoadsInFlight];
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int64_t at = chunk + (i * kThreads + static_cast<int>(threadIdx.x)) * 16;
      if (at < vector_bytes) loaded[i] = load16_once(source + at);
    }
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; ++i) {
      const int64_t at = chunk + (i * kThreads + static_cast<int>(threadIdx.x)) * 16;
      if (at < vector_bytes) store16(destination + at, loaded[i]);
    }
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = vector_bytes + blockIdx.x * kThreads + threadIdx.x; at < piece.bytes; at += step) {
    destination[at] = source[at];
  }
}

cudaPointerAttributes attributes_of(const void* address) {
  cudaPointerAttributes attributes{};
  require("cudaPointerGetAttributes", cudaPointerGetAttributes(&attributes, address));
  return attributes;
}

bool is_device_memory(const cudaPointerAttributes& attributes) {
  return attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
}

bool is_aligned(const Piece& piece) {
  return (reinterpret_cast<uintptr_t>(piece.destination) | reinterpret_cast<uintptr_t>(piece.source)) % 16 == 0;
}

bool is_legacy_default(cudaStream_t stream) { return stream == nullptr || stream == cudaStreamLegacy; }

bool driver_has_batches() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12080;
}

// Why the stream cannot take cudaMemcpyBatchAsync; null if it can.
const char* batch_obstacle(cudaStream_t stream) {
#if CUDART_VERSION >= 12080
  if (!driver_has_batches()) return "the driver is older than CUDA 12.8";
  if (is_legacy_default(stream)) return "the stream is the legacy default stream";
  return is_capturing(stream) ? "the stream is being captured" : nullptr;
#else
  (void)stream;
  return "hmi_kernels was compiled with a CUDA toolkit older than 12.8";
#endif
}

// kLoop copes with everything; the others are chosen only for memory that needs no staging.
bool can_use(CopyMethod method, const std::vector<Piece>& pieces, cudaStream_t stream) {
  if (method == CopyMethod::kLoop) return true;
  if (method == CopyMethod::kBatch && batch_obstacle(stream) != nullptr) return false;
  return std::all_of(pieces.begin(), pieces.end(), [&](const Piece& piece) {
    const cudaPointerAttributes destination = attributes_of(piece.destination), source = attributes_of(piece.source);
    if (destination.type == cudaMemoryTypeUnregistered || source.type == cudaMemoryTypeUnregistered) return false;
    return method == CopyMethod::kBatch || (is_aligned(piece) && is_device_memory(destination));
  });
}

void copy_each(const std::vector<Piece>& pieces, cudaStream_t stream) {
  for (const Piece& piece : pieces) {
    require("cudaMemcpyAsync",
            cudaMemcpyAsync(piece.destination, piece.source, piece.bytes, cudaMemcpyDefault, stream));
  }
}

#if CUDART_VERSION >= 12080
void copy_together(const std::vector<Piece>& pieces, cudaStream_t stream) {
  std::vector<void*> destinations, sources;
  std::vector<size_t> sizes;
  for (const Piece& piece : pieces) {
    destinations.push_back(piece.destination);
    sources.push_back(const_cast<void*>(piece.source));
    sizes.push_back(piece.bytes);
  }
  cudaMemcpyAttributes attributes{};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first_piece = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaMemcpyBatchAsync(destinations.data(), sources.data(), sizes.data(), sizes.size(),
                                                 &attributes, &first_piece, 1, stream);
#else
  size_t failed = 0;
  const cudaError_t error = cudaMemcpyBatchAsync(destinations.data(), sources.data(), sizes.data(), sizes.size(),
                                                 &attributes, &first_piece, 1, &failed, stream);
#endif
  require("cudaMemcpyBatchAsync", error);
}
#endif

// The pieces as the device addresses them.
std::vector<Piece> require_readable_in_place(const std::vector<Piece>& pieces) {
  std::vector<Piece> mapped = pieces;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const cudaPointerAttributes source = attributes_of(pieces[i].source);
    if (source.type == cudaMemoryTypeUnregistered || source.devicePointer == nullptr) {
      throw std::invalid_argument("source " + std::to_string(i) +
                                  " is in pageable memory, which method kernel cannot read: take it from a PinnedPool");
    }
    if (!is_device_memory(attributes_of(pieces[i].destination))) {
      throw std::invalid_argument("destination " + std::to_string(i) + " is not in device memory, as method kernel needs");
    }
    mapped[i].source = source.devicePointer;
  }
  return mapped;
}

void copy_by_kernel(const std::vector<Piece>& pieces, cudaStream_t stream) {
  for (size_t first = 0; first < pieces.size(); first += kPiecesPerLaunch) {
    const size_t count = std::min(kPiecesPerLaunch, pieces.size() - first);
    PieceTable table{};
    std::copy_n(pieces.begin() + first, count, table.pieces);
    int64_t largest = 0;
    for (size_t i = 0; i < count; ++i) largest = std::max(largest, table.pieces[i].bytes);
    const int64_t blocks = std::min(kMaxBlocksPerPiece, (largest + kChunkBytes - 1) / kChunkBytes);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
    require("launch of gather_pieces", launch(gather_pieces, grid, dim3(kThreads), 0, stream, table));
  }
}

// Everything that can be refused is refused here, before anything starts.
std::vector<Piece> prepare(const std::vector<Piece>& pieces, CopyMethod method, cudaStream_t stream) {
  std::vector<Piece> used;
  std::copy_if(pieces.begin(), pieces.end(), std::back_inserter(used), [](const Piece& p) { return p.bytes > 0; });
  if (method == CopyMethod::kKernel) return require_readable_in_place(used);
  if (method == CopyMethod::kBatch) {
    if (const char* obstacle = batch_obstacle(stream)) {
      throw std::invalid_argument(std::string("method batch cannot be used: ") + obstacle);
    }
  }
  return used;
}

void start(const std::vector<Piece>& pieces, CopyMethod method, cudaStream_t stream) {
  if (method == CopyMethod::kKernel) return copy_by_kernel(pieces, stream);
#if CUDART_VERSION >= 12080
  if (method == CopyMethod::kBatch) return copy_together(pieces, stream);
#endif
  copy_each(pieces, stream);
}

}  // namespace

bool is_capturing(cudaStream_t stream) {
  if (is_legacy_default(stream)) return false;  // and must not be asked while another one is
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  require("cudaStreamIsCapturing", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

int device_of_stream(cudaStream_t stream) {
  int device = 0;
#if CUDART_VERSION >= 12080
  if (stream != nullptr && driver_has_batches()) {  // both came with CUDA 12.8
    require("cudaStreamGetDevice", cudaStreamGetDevice(stream, &device));
    return device;
  }
#endif
  require("cudaGetDevice", cudaGetDevice(&device));
  return device;
}

int require_stream_of_pieces(const std::vector<Piece>& pieces, cudaStream_t stream) {
  int device = device_of_stream(stream);
  for (const Piece& piece : pieces) {
    const cudaPointerAttributes destination = attributes_of(piece.destination), source = attributes_of(piece.source);
    if (!is_device_memory(destination) && !is_device_memory(source)) continue;
    const int found = is_device_memory(destination) ? destination.device : source.device;
    // The default stream is every device's own.
    if (stream != nullptr && found != device) {
      throw std::invalid_argument("stream is device " + std::to_string(device) + "'s, but the tensors are on device " +
                                  std::to_string(found));
    }
    return found;  // hmi_kernels sees to it that all tensors are on one device
  }
  return device;
}

CopyMethod choose_copy_method(const std::vector<Piece>& pieces, cudaStream_t stream) {
  int64_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  const int64_t mean = pieces.empty() ? 0 : bytes / static_cast<int64_t>(pieces.size());
  for (const CopyRule& rule : kCopyRules) {
    const bool meets = pieces.size() >= rule.min_pieces && mean <= rule.max_mean_bytes;
    if (meets && can_use(rule.method, pieces, stream)) return rule.method;
  }
  return CopyMethod::kLoop;
}

void copy_batch(const std::vector<Piece>& pieces, CopyMethod method, cudaStream_t stream) {
  if (method == CopyMethod::kAuto) method = choose_copy_method(pieces, stream);
  const std::vector<Piece> prepared = prepare(pieces, method, stream);
  if (prepared.empty()) return;
  try {
    start(prepared, method, stream);
  } catch (const CudaError&) {
    wait_after_failure(stream);
    throw;
  }
}

void wait_after_failure(cudaStream_t stream) {
  if (cudaStreamSynchronize(stream) != cudaSuccess) cudaGetLastError();
}

}  // namespace hmi::cuda
