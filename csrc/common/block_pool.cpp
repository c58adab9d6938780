#include "common/block_pool.h"

#include <cstdlib>
#include <new>
#include <string>
#include <utility>

namespace hmi {
namespace {

constexpr size_t kPageBytes = 4096;
constexpr size_t kSizesPerDoubling = 8;

void* allocate_pages(size_t bytes) {
  void* const address = std::aligned_alloc(kPageBytes, bytes);
  if (address == nullptr) throw std::bad_alloc();
  return address;
}

}  // namespace

const BlockAllocator& plain_allocator() {
  static const BlockAllocator allocator{&allocate_pages, [](void* address) noexcept { std::free(address); },
                                        [](void*, size_t, bool) {}, [](void*) noexcept {}, false};
  return allocator;
}

size_t block_size(size_t bytes) {
  size_t step = kPageBytes;
  while (step * 2 * kSizesPerDoubling <= bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

std::unique_ptr<Block> BlockPool::allocate(size_t bytes) {
  // Also keeps block_size() from overflowing.
  const size_t block_bytes = bytes > budget_bytes_ ? bytes : block_size(bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  require_open();
  void* address = nullptr;
  if (bytes == 0) {
    // A block of nothing.
  } else if (const auto found = cached_.find(block_bytes); found != cached_.end()) {
    address = found->second.back().address;  // the newest: its pages are the likeliest to lie in the caches
    found->second.pop_back();
    if (found->second.empty()) cached_.erase(found);
    bytes_cached_ -= block_bytes;
  } else {
    make_room(block_bytes, bytes);
    address = allocate_new(block_bytes);
  }
  bytes_in_use_ += block_bytes;
  return std::make_unique<Block>(shared_from_this(), address, bytes, block_bytes);
}

// The machine may have less to give than the budget allows: then what is cached is worth more as memory.
void* BlockPool::allocate_new(size_t bytes) {
  try {
    return allocator_.allocate(bytes);
  } catch (...) {
    if (cached_.empty()) throw;
  }
  while (!cached_.empty()) release_oldest();
  return allocator_.allocate(bytes);
}

void BlockPool::enlist(void* address, size_t bytes, bool is_read_only) {
  const std::lock_guard<std::mutex> lock(mutex_);
  require_open();
  make_room(bytes, bytes);
  const auto [entry, is_new] = enlisted_.emplace(address, bytes);
  if (!is_new) throw std::invalid_argument("this memory is registered with the pool already");
  try {
    allocator_.enlist(address, bytes, is_read_only);
  } catch (...) {
    enlisted_.erase(entry);
    throw;
  }
  bytes_in_use_ += bytes;
}

void BlockPool::close() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_closed_ = true;
  while (!cached_.empty()) release_oldest();
  for (const auto& [address, bytes] : enlisted_) {
    allocator_.discharge(address);
    bytes_in_use_ -= bytes;
  }
  enlisted_.clear();
}

void BlockPool::give_back(void* address, size_t bytes) noexcept {
  if (address == nullptr) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes_in_use_ -= bytes;
  if (is_closed_) return allocator_.release(address);
  try {
    cached_[bytes].push_back({address, num_cached_++});
    bytes_cached_ += bytes;
  } catch (const std::bad_alloc&) {  // no memory for the books
    const auto found = cached_.find(bytes);
    if (found != cached_.end() && found->second.empty()) cached_.erase(found);
    allocator_.release(address);
  }
}

// Frees cached blocks until so many bytes fit into the budget.
void BlockPool::make_room(size_t bytes, size_t asked) {
  const size_t available = budget_bytes_ - bytes_in_use_;
  if (bytes > available) {
    throw PoolExhausted(std::to_string(asked) + " bytes were asked for (" + std::to_string(bytes) +
                        " with rounding), but " + std::to_string(bytes_in_use_) + " of the pool's budget of " +
                        std::to_string(budget_bytes_) + " bytes are in use: drop tensors or raise budget_bytes");
  }
  while (bytes_cached_ > available - bytes) release_oldest();
}

void BlockPool::require_open() const {
  if (is_closed_) throw PoolClosed("the pool is closed: make a new PinnedPool");
}

void BlockPool::release_oldest() noexcept {
  auto oldest = cached_.begin();
  for (auto entry = cached_.begin(); entry != cached_.end(); ++entry) {
    if (entry->second.front().cached_at < oldest->second.front().cached_at) oldest = entry;
  }
  allocator_.release(oldest->second.front().address);
  oldest->second.pop_front();
  bytes_cached_ -= oldest->first;
  if (oldest->second.empty()) cached_.erase(oldest);
}

bool BlockPool::is_closed() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return is_closed_;
}

size_t BlockPool::bytes_in_use() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_in_use_;
}

size_t BlockPool::bytes_reserved() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return bytes_in_use_ + bytes_cached_;
}

}  // namespace hmi
